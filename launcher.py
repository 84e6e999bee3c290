"""Entry point: `python launcher.py recipe=NAME stage=STAGE key=value ...`; without arguments it runs the demo from text to export."""

import signal
import sys

import hydra
from omegaconf import DictConfig

from yxanul_nemo.config.command_line import config_dirs_in, for_hydra, overrides_in
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.help import help_text
from yxanul_nemo.launch.stages import StageFailed, Stopped, run_stages
from yxanul_nemo.streams import outlive_reader

TYPED = sys.argv[1:]
"""The arguments as the shell has handed them over, which the run's records name."""
ONLY_HYDRA_CAN_READ = {"--hydra-help", "--shell-completion", "-sc", "-m", "--multirun"}


def fail(message: object, exit_code: int) -> None:
    """End the process with one message."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Check the composed configuration and run its stages."""
    # Hydra has read them in its own form.
    sys.argv[1:] = TYPED
    try:
        run_stages(parse(composed))
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


if __name__ == "__main__":
    outlive_reader()
    if {"--help", "-h"} & set(sys.argv):
        print(help_text())
        sys.exit()
    # Hydra ends with 1 and its own wording on a wrong override; composing first lets the project's words and exit code apply.
    try:
        sys.argv[1:] = for_hydra(sys.argv[1:])
        if not ONLY_HYDRA_CAN_READ & set(sys.argv):
            compose(overrides_in(sys.argv[1:]), config_dirs_in(sys.argv[1:]))
    except UserError as error:
        fail(error, 2)
    main()
