"""The command line: `yxanul`, and `python launcher.py` in a clone.

What only looks (help, plan, status) answers at once, so everything heavy is imported where it is needed.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.surroundings import keep_bytecode
from yxanul_nemo.streams import outlive_reader

if TYPE_CHECKING:
    from yxanul_nemo.config.run import RunConfig

TYPED = sys.argv[1:]
"""The arguments as the shell has handed them over, which the run's records name."""
ONLY_HYDRA_CAN_READ = {"--hydra-help", "--shell-completion", "-sc"}


def fail(message: object, exit_code: int) -> None:
    """End the process with one message."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def main() -> None:
    """Do what the command line asks for."""
    if {"--help", "-h"} & set(sys.argv):
        from yxanul_nemo.launch.help import help_text

        print(help_text())
        return
    # Before what takes long to compile.
    keep_bytecode(os.environ)
    from yxanul_nemo.config.command_line import SWEEPS, config_dirs_in, for_hydra, has_hydra_options, overrides_in
    from yxanul_nemo.config.conf_files import CONF_DIR, own_conf_dirs
    from yxanul_nemo.config.load import compose, parse
    from yxanul_nemo.launch.own_settings import asked_settings

    try:
        arguments = for_hydra(TYPED)
        overrides, config_dirs = overrides_in(arguments), [*config_dirs_in(arguments), *own_conf_dirs()]
        if SWEEPS & set(arguments):
            from yxanul_nemo.launch.sweep import run_sweep

            ending_well(lambda: run_sweep(overrides, config_dirs))
            return
        if not has_hydra_options(arguments):
            config, said = asked_settings(overrides, config_dirs)
        elif not ONLY_HYDRA_CAN_READ & set(arguments):
            # Before Hydra reads its own options, too: it ends with 1 and its own wording on a wrong override.
            compose(overrides, config_dirs)
    except UserError as error:
        fail(error, 2)
    if not has_hydra_options(arguments):
        for line in said:
            print(line, file=sys.stderr)
        run(config)
        return
    import hydra

    def parse_and_run(composed: Mapping[str, Any]) -> None:
        try:
            config = parse(composed)
        except UserError as error:
            fail(error, 2)
        run(config)

    # Hydra takes one folder: the one that was named, else the user's own.
    named = [] if config_dirs_in(arguments) else [f"--config-dir={folder}" for folder in own_conf_dirs()]
    sys.argv[1:] = [*arguments, *named]
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(parse_and_run)()


def run(config: "RunConfig") -> None:
    """Run the stages that a configuration asks for."""
    from yxanul_nemo.launch.stages import run_stages

    # Hydra may have read them in its own form.
    sys.argv[1:] = TYPED
    ending_well(lambda: run_stages(config))


def ending_well(work: Callable[[], None]) -> None:
    """Do something; what stands in its way becomes a message and an exit code."""
    from yxanul_nemo.launch.stages import StageFailed, Stopped

    try:
        work()
    except UserError as error:
        fail(error, 2)
    except StageFailed as error:
        fail(error, error.exit_code)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        # In a stage that runs alone, such as a text that is long enough.
        sys.exit(128 + signal.SIGINT)


def run_command() -> None:
    """Do what the command line asks for, whoever reads what it says."""
    outlive_reader()
    main()
