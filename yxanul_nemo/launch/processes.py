"""Worker processes: started ahead, one task after another, logged to console and file, never outliving the launcher unheard."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import IO, BinaryIO

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.launch.display import TaskDisplay
from yxanul_nemo.launch.interrupts import StopSignals
from yxanul_nemo.launch.slurm.step import srun_command
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpus import process_count, threads_per_process, world_size
from yxanul_nemo.machine.surroundings import without_place
from yxanul_nemo.shared_files import open_for_appending

WORKER = "yxanul_nemo.launch.worker"
RANKS = "yxanul_nemo.launch.ranks"
PR_SET_PDEATHSIG = 1
CONTROL = b"\0yxanul "
"""Begins what a worker tells the launcher on its standard output: `begin PID`, `end CODE`, and `progress JSON` behind a record's line."""
SAVING_SECONDS = 120.0
"""How long a worker may take to save where the launcher itself has failed."""
ENDING_SECONDS = 30.0
"""How long a worker that waits for a task, and has nothing to save, may take to end."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class ToldProcess(subprocess.Popen[bytes]):
    """A process that is told its tasks on its standard input, a pipe."""

    stdin: IO[bytes]


class Worker(ToldProcess):
    """One whose output comes through a pipe, too."""

    stdout: IO[bytes]


class Workers:
    """Runs tasks one after another in processes that stay from one to the next.

    A process takes half a minute to import its libraries, open its GPU and meet the other ranks, so it does all tasks of as many ranks
    as it is one of; each begins from what is committed, as in a process that was just started. A task that fails ends its process.

    - One rank is one process; several on this machine are those of `launch.ranks`. Both are told tasks on their standard input, so that
      they can be started while other work goes on.
    - In a Slurm job, which is one task, srun starts the ranks on all nodes.

    Workers hold the run's lock and form sessions of their own, so that Ctrl-C in a terminal reaches only the launcher.
    """

    def __init__(self, config: RunConfig, lock_fd: int, signals: StopSignals):
        self.last_lines: deque[str] = deque(maxlen=20)
        self._config, self._lock_fd, self._signals = config, lock_fd, signals
        self._in_job = config.cluster.scheduler == "slurm"
        self._waiting: dict[int, Worker] = {}
        """Processes that wait for a task, by their ranks."""
        self._log_failed = False

    def log_path(self, task: Task) -> Path:
        """File with all that a task has printed."""
        return self._config.run.folder.log(task.name)

    def start_ahead(self, task: Task) -> None:
        """Let the processes for `task` import what they need, where they can wait for it."""
        ranks = self._ranks(task)
        if not self._in_job and ranks not in self._waiting:
            self._waiting[ranks] = self._start(task)

    def run(self, task: Task, after: Task | None) -> int:
        """Do `task` and pass on what it prints until it ends.

        Args:
            after: the task that comes next, if any does.

        Returns:
            0 done or stopped on request, 2 the user's mistake, 1 a failure of our own, -N killed by signal N.
        """
        self.last_lines.clear()
        ranks = self._ranks(task)
        self._dismiss(set(self._waiting) - {ranks})
        process = self._waiting.pop(ranks, None) or self._start(task)
        if not self._in_job:
            # If it has ended already, its output says why, and its exit code counts.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{task.name}\n".encode())
                process.stdin.flush()
        if after is not None and self._ranks(after) != ranks:
            self.start_ahead(after)
        try:
            self.log_path(task).parent.mkdir(parents=True, exist_ok=True)
            with (
                open_for_appending(self.log_path(task)) as log_file,
                TaskDisplay(self._config, task, self._signals) as display,
            ):
                ends = self._follow(process, log_file, display, ranks)
        except BaseException:
            _let_save(process)
            raise
        finally:
            self._signals.task_ended()
        done = ends.count(0) == ranks
        if done and not self._in_job:
            self._waiting[ranks] = process
            return 0
        code = process.wait()
        _end(process)
        # What ranks say counts: one may have told the user's mistake before the others were ended.
        return 2 if 2 in ends else 0 if done else code or 1

    def close(self) -> None:
        """End the processes that wait for a task."""
        self._dismiss(set(self._waiting))

    def _ranks(self, task: Task) -> int:
        """Only an export is always one process."""
        return 1 if task.kind == "export" else world_size(self._config)

    def _dismiss(self, ranks: set[int]) -> None:
        """End the waiting processes of so many ranks; when it returns, a GPU has back what they held of it."""
        dismissed = [self._waiting.pop(number) for number in ranks]
        for process in dismissed:
            process.terminate()
        for process in dismissed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
            _end(process)

    def _start(self, task: Task) -> Worker:
        ranks = self._ranks(task)
        worker = [str(self._config.run.dir), *(f"--callback={path}" for path in self._config.callbacks)]
        if self._in_job:
            command = [*srun_command(self._config, process_count(self._config), ranks), *worker, task.name]
        elif ranks > 1:
            command = [sys.executable, "-m", RANKS, str(ranks), *worker]
        else:
            command = [sys.executable, "-m", WORKER, *worker]
        threads = threads_per_process(self._config, min(ranks, process_count(self._config)))
        launcher = os.getpid()
        return Worker(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # The launcher alone starts the others, but in a Slurm job, whose script may say where rank 0 listens.
            env=(dict(os.environ) if self._in_job else without_place(os.environ))
            | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            pass_fds=(self._lock_fd,),
            start_new_session=True,
            # A launcher that is killed takes its worker along, which still saves its state.
            preexec_fn=lambda: end_with_parent(launcher),
        )

    def _follow(self, process: Worker, log_file: BinaryIO, display: TaskDisplay, ranks: int) -> list[int]:
        """Pass output on until all ranks have done the task and wait for the next one, else to its end; what was said of ends."""
        begun, ends = 0, []
        for line in process.stdout:
            text, _, told = line.partition(CONTROL)
            word, _, what = told.partition(b" ")
            if text:
                self._keep(text if text.endswith(b"\n") else text + b"\n", log_file)
                display.text(text, json.loads(what) if word == b"progress" else None)
            if word == b"begin":
                begun += 1
                if not self._in_job:
                    self._signals.task_began(int(what))
                elif begun == ranks:
                    # srun passes signals on to the ranks, which may be on other machines.
                    self._signals.task_began(process.pid)
            elif word == b"end":
                ends.append(int(what))
                if ends.count(0) == ranks and not self._in_job:
                    break
        return ends

    def _keep(self, text: bytes, log_file: BinaryIO) -> None:
        try:
            log_file.write(text)
        except OSError as error:
            # A full disk ends the task where it cannot save, not where it cannot be written about.
            if not self._log_failed:
                logger.warning("%s cannot be written (%s)", log_file.name, error.strerror)
            self._log_failed = True
        self.last_lines.append(text.decode(errors="replace").rstrip())


def end_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent, of this process id, is gone."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _let_save(process: Worker) -> None:
    """End a worker that nobody follows any more: what it has trained it saves, and what it says goes into its log."""
    process.stdout.close()
    process.terminate()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SAVING_SECONDS)
    _end(process)


def _end(process: Worker) -> None:
    """Kill a worker at once; the ranks of a group get SIGTERM by that, and save."""
    process.kill()
    process.wait()
    # Closing flushes what a worker that is gone can no longer read.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
