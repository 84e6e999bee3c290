"""A process for the tasks of a run: `python -m yxanul_nemo.launch.worker RUN_DIR [TASK] [--callback PATH]...`.

With a TASK (phase-01, validate, export) it does that one. Without, it imports what tasks need, touching neither GPU nor files, and
does those that are named on its standard input, one after another, until one fails. Each begins from what is committed, whatever this
process has done before. It tells the launcher on its standard output, beside the log, where a task begins, how far it is and how it
ends (`processes.CONTROL`).
"""

import argparse
import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.processes import CONTROL, end_with_parent
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.log import configure_logging, quiet_libraries
from yxanul_nemo.machine.gpus import rank_and_processes
from yxanul_nemo.run_folder import RunFolder
from yxanul_nemo.streams import outlive_reader, say
from yxanul_nemo.user_callbacks import load_callbacks


def main() -> int:
    """Exit code: 0 done or stopped on request, 2 the user's mistake, 1 our own failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("task", nargs="?")
    parser.add_argument("--callback", action="append", default=[], help="import path of a training callback")
    arguments = parser.parse_args()
    end_with_parent(os.getppid())
    outlive_reader(RunFolder(arguments.run_dir).log(arguments.task) if arguments.task else None)
    # What all ranks do alike is said by the first one.
    configure_logging(level=logging.WARNING if rank_and_processes()[0] else logging.INFO)
    quiet_libraries()
    import yxanul_nemo.training.loop  # noqa: F401 - most of the time that a short task takes

    quiet_libraries()
    code = 0
    for name in [arguments.task] if arguments.task else sys.stdin:
        task = Task.named(name.strip())
        outlive_reader(RunFolder(arguments.run_dir).log(task.name))
        code = do(arguments.run_dir, task, arguments.callback)
        if code:
            return code
    # NCCL complains of processes that end without; after a failure it would wait for the other ranks.
    from yxanul_nemo.machine.runtime import leave_process_groups

    leave_process_groups()
    return code


def do(run_dir: Path, task: Task, callbacks: Sequence[str]) -> int:
    """Do a task, with its begin and end told; returns the exit code, 0 if the process is as ready for the next one as a new one.

    Args:
        callbacks: import paths of the user's callbacks, which no file of the run holds.
    """
    try:
        config = load_run_config(RunFolder(run_dir).config)
        if task.kind == "train":
            from yxanul_nemo.training.loop import train_phase
            from yxanul_nemo.training.prepare import prepare_phase
            from yxanul_nemo.training.signals import StopRequest

            stop = StopRequest()
            stop.install()
            tell(f"begin {os.getpid()}")
            made = load_callbacks(callbacks)
            train_phase(prepare_phase(config, task.phase), stop, tell_progress, made)
        else:
            tell(f"begin {os.getpid()}")
            use_checkpoint(config, task)
        become_idle()
        code = 0
    except UserError as error:
        rank, _ = rank_and_processes()
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:  # noqa: BLE001 - the last frame: everything else is our failure and ends with its traceback
        traceback.print_exc()
        code = 1
    tell(f"end {code}")
    return code


def become_idle() -> None:
    """Give back what the task has held, and let a signal end the process, which has nothing to save until the next task."""
    import torch

    from yxanul_nemo.training.backend import forget_backends

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forget_backends("cuda" if torch.cuda.is_initialized() else "cpu")


def tell(what: str) -> None:
    """Say something to the launcher, in one write so that ranks cannot mix their words."""
    say(b"", CONTROL + what.encode())


def tell_progress(line: str, progress: Mapping[str, Any]) -> None:
    """Say a record's line with the record behind it: a launcher draws the one or passes on the other, a bare terminal shows both."""
    finite = {name: value if math.isfinite(value) else None for name, value in progress.items()}
    shown = f"{time.strftime('%H:%M:%S')} {line}".encode()
    say(shown, CONTROL + b"progress " + json.dumps(finite).encode())


def use_checkpoint(config: RunConfig, task: Task) -> None:
    """Do a task that trains nothing: validate or export."""
    if task.kind == "validate":
        from yxanul_nemo.validation.stage import validate_checkpoint

        validate_checkpoint(config)
    else:
        from yxanul_nemo.export.export import export_checkpoint

        export_checkpoint(config)


if __name__ == "__main__":
    sys.exit(main())
