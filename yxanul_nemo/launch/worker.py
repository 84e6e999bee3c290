"""A process for the tasks of a run: `python -m yxanul_nemo.launch.worker RUN_DIR [TASK] [--fork]`.

With a TASK (phase-01, validate, export) it does that one. Without, it imports what tasks need, touching neither GPU nor
files, and waits for a task's name on its standard input; with --fork it does each one in a forked process and stays.
It tells the launcher on its standard output, beside the log, where a task begins, how far it is and how it ends
(`processes.CONTROL`).
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
from collections.abc import Mapping
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


def main() -> int:
    """Exit code: 0 done or stopped on request, 2 the user's mistake, 1 our own failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("task", nargs="?")
    parser.add_argument("--fork", action="store_true")
    arguments = parser.parse_args()
    end_with_parent(os.getppid())
    outlive_reader(RunFolder(arguments.run_dir).log(arguments.task) if arguments.task else None)
    # What all ranks do alike is said by the first one.
    configure_logging(level=logging.WARNING if rank_and_processes()[0] else logging.INFO)
    quiet_libraries()
    import yxanul_nemo.training.session  # noqa: F401 - most of the time that a short task takes

    quiet_libraries()
    if arguments.task is not None:
        return do(arguments.run_dir, Task.named(arguments.task))
    for line in sys.stdin:
        task = Task.named(line.strip())
        if not arguments.fork:
            outlive_reader(RunFolder(arguments.run_dir).log(task.name))
            return do(arguments.run_dir, task)
        do_in_fork(arguments.run_dir, task)
    return 0


def do_in_fork(run_dir: Path, task: Task) -> None:
    """Do a task in a process of its own, which has all imports from this one, and tell how it ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            end_with_parent(parent)
            outlive_reader(RunFolder(run_dir).log(task.name))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = do(run_dir, task, tells_end=False)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    # Signals are the task's: a scheduler may send them to every process, and this one must live to tell the end.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGUSR1)}
    previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
    _, status = os.waitpid(pid, 0)
    for number, handler in previous.items():
        signal.signal(number, handler)
    tell(f"end {os.waitstatus_to_exitcode(status)}")


def do(run_dir: Path, task: Task, tells_end: bool = True) -> int:
    """Do a task, with its begin and end told; returns the exit code."""
    try:
        run(load_run_config(RunFolder(run_dir).config), task)
        # NCCL complains of processes that end without; after a failure it would wait for the other ranks.
        from yxanul_nemo.machine.runtime import leave_process_groups

        leave_process_groups()
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
    if tells_end:
        tell(f"end {code}")
    return code


def tell(what: str) -> None:
    """Say something to the launcher, in one write so that ranks cannot mix their words."""
    say(b"", CONTROL + what.encode())


def tell_progress(line: str, progress: Mapping[str, Any]) -> None:
    """Say a record's line with the record behind it: a launcher draws the one or passes on the other, a bare terminal shows both."""
    finite = {name: value if math.isfinite(value) else None for name, value in progress.items()}
    shown = f"{time.strftime('%H:%M:%S')} {line}".encode()
    say(shown, CONTROL + b"progress " + json.dumps(finite).encode())


def run(config: RunConfig, task: Task) -> None:
    """Do the task."""
    if task.kind == "train":
        from yxanul_nemo.training.session import PhaseSession
        from yxanul_nemo.training.signals import StopRequest

        stop = StopRequest()
        stop.install()
        tell(f"begin {os.getpid()}")
        PhaseSession(config, task.phase, tell_progress).run(stop)
        return
    tell(f"begin {os.getpid()}")
    if task.kind == "validate":
        from yxanul_nemo.validation.stage import validate_checkpoint

        validate_checkpoint(config)
    else:
        from yxanul_nemo.export.export import export_checkpoint

        export_checkpoint(config)


if __name__ == "__main__":
    sys.exit(main())
