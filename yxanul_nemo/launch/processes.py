"""Worker processes: imported ahead, one task at a time, logged to console and file, never outliving the launcher unheard."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import BinaryIO

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.launch.display import TaskDisplay
from yxanul_nemo.launch.interrupts import StopSignals
from yxanul_nemo.launch.slurm.step import srun_command
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpus import process_count, threads_per_process, visible_gpus, world_size
from yxanul_nemo.machine.surroundings import without_place
from yxanul_nemo.shared_files import open_for_appending

WORKER = "yxanul_nemo.launch.worker"
PR_SET_PDEATHSIG = 1
CONTROL = b"\0yxanul "
"""Begins what a worker tells the launcher on its standard output: `begin PID`, `end CODE`, and `progress JSON` behind a record's line."""
SAVING_SECONDS = 120.0
"""How long a worker may take to save where the launcher itself has failed."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class Workers:
    """Runs tasks one after another, each in a process of its own. Importing takes a worker ten seconds and more, so:

    - on a CPU one worker is started ahead, imports once, and forks a process for each task;
    - on one GPU, whose driver does not survive a fork, the next task's worker is started while the present one is at work;
    - of several processes torchrun is in charge; only an export is always one process;
    - in a Slurm job srun starts them, on all of its nodes.

    Workers hold the run's lock and form sessions of their own, so that Ctrl-C in a terminal reaches only the launcher.
    """

    def __init__(self, config: RunConfig, lock_fd: int, signals: StopSignals):
        self.last_lines: deque[str] = deque(maxlen=20)
        self._config, self._lock_fd, self._signals = config, lock_fd, signals
        self._ranks = world_size(config)
        self._in_job = config.cluster.scheduler == "slurm"
        self._waits = self._ranks == 1 and not self._in_job
        """Whether a worker is given its task on its standard input."""
        self._forks = self._waits and (config.parallel.device == "cpu" or visible_gpus() == 0)
        self._ahead: subprocess.Popen | None = None
        self._log_failed = False

    def log_path(self, task: Task) -> Path:
        """File with all that a task has printed."""
        return self._config.run.folder.log(task.name)

    def start_ahead(self) -> None:
        """Let a worker import what tasks need, where it can wait for one."""
        if self._ahead is None and self._waits:
            self._ahead = self._start()

    def run(self, task: Task, more: bool) -> int:
        """Do `task` and pass on what it prints until it ends.

        Args:
            more: whether other tasks will follow.

        Returns:
            0 done or stopped on request, 2 the user's mistake, 1 a failure of our own, -N killed by signal N.
        """
        self.last_lines.clear()
        ranks = 1 if task.kind == "export" else self._ranks
        process, self._ahead = self._ahead or self._start(task, ranks), None
        if self._waits:
            # If it has ended already, its output says why, and its exit code counts.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{task.name}\n".encode())
                process.stdin.flush()
            if more and not self._forks:
                self.start_ahead()
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
        if self._forks and ends:
            self._ahead = process
            return ends[0]
        code = process.wait()
        _end(process)
        # What ranks say counts: one may have told the user's mistake while torchrun ended the others.
        return 2 if 2 in ends else 0 if ends.count(0) == ranks else code or 1

    def close(self) -> None:
        """End the worker that waits for a task; it has nothing to save."""
        if self._ahead is not None:
            _end(self._ahead)
            self._ahead = None

    def _start(self, task: Task | None = None, ranks: int = 1) -> subprocess.Popen:
        worker = [str(self._config.run.dir)]
        if not self._waits:
            worker.append(task.name)
        elif self._forks:
            worker.append("--fork")
        if self._in_job:
            command = srun_command(self._config, process_count(self._config), ranks) + worker
        elif ranks > 1:
            torchrun = ["yxanul_nemo.launch.ranks", f"--nproc-per-node={ranks}", "--standalone"]
            command = [sys.executable, "-m", *torchrun, "-m", WORKER, *worker]
        else:
            command = [sys.executable, "-m", WORKER, *worker]
        threads = threads_per_process(self._config, min(ranks, process_count(self._config)))
        launcher = os.getpid()
        return subprocess.Popen(
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

    def _follow(self, process: subprocess.Popen, log_file: BinaryIO, display: TaskDisplay, ranks: int) -> list[int]:
        """Pass output on to its end, or to the end of the task where the worker stays; what was said of ends."""
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
                if self._forks:
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


def _let_save(process: subprocess.Popen) -> None:
    """End a worker that nobody follows any more: what it has trained it saves, and what it says goes into its log."""
    process.stdout.close()
    process.terminate()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SAVING_SECONDS)
    _end(process)


def _end(process: subprocess.Popen) -> None:
    """Kill a worker at once; a task that it has forked gets SIGTERM by that, and saves."""
    process.kill()
    process.wait()
    # Closing flushes what a worker that is gone can no longer read.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
