"""Worker processes: started ahead, released when it is their turn, logged to console and file, never outliving the launcher unheard."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.log import logger

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Task:
    """What a worker is to do."""

    kind: str
    """train, validate or export."""
    phase: int = 0
    """Phase of a train task."""

    @property
    def name(self) -> str:
        """For messages and file names."""
        return f"phase-{self.phase:02d}" if self.kind == "train" else self.kind


class Worker:
    """One worker process (or torchrun with its ranks), waiting until `run`."""

    def __init__(self, config: RunConfig, task: Task, lock_fd: int):
        self.task = task
        self.log_path = config.run.dir / "logs" / f"{task.name}.log"
        self.last_lines: deque[str] = deque(maxlen=20)
        processes = process_count(config)
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m"]
        command += ["yxanul_nemo.launch.worker", str(config.run.dir), task.kind, f"--phase={task.phase}"]
        self.waits = processes == 1
        if self.waits:
            command.append("--standby")
        self._command, self._lock_fd = command, lock_fd
        self._environment = os.environ | {
            "OMP_NUM_THREADS": str(threads_per_process(config, processes)),
            "PYTHONUNBUFFERED": "1",
        }
        self._process = self._start() if self.waits else None

    def run(self) -> int:
        """Release the worker, pass its output on until it ends, and return its exit code."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.waits:
            try:
                process.stdin.write(b"go\n")
                process.stdin.flush()
            except BrokenPipeError:
                logger.warning("%s ended before its turn", self.task.name)
        with open(self.log_path, "ab") as log_file:
            reader = threading.Thread(target=self._pass_on, args=(process.stdout, log_file), daemon=True)
            reader.start()
            code = self._wait(process)
            reader.join()
        process.stdin.close()
        return code

    def cancel(self) -> None:
        """End a worker that never got its turn."""
        if self._process is not None and self._process.poll() is None:
            self._process.stdin.close()
            self._process.terminate()
            self._process.wait()

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            pass_fds=(self._lock_fd,),
            # A launcher that is killed takes its worker along, which still saves its state.
            preexec_fn=_end_with_parent,
        )

    def _wait(self, process: subprocess.Popen) -> int:
        """Ctrl-C and scheduler signals reach the worker, which saves and ends; the launcher waits for that."""

        def forward(number: int, frame: object) -> None:
            process.send_signal(number)

        previous = {
            number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, stream: IO[bytes], log_file: IO[bytes]) -> None:
        for line in stream:
            log_file.write(line)
            log_file.flush()
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            self.last_lines.append(line.decode(errors="replace").rstrip())


def process_count(config: RunConfig) -> int:
    """Training processes on this machine."""
    count = config.parallel.processes_per_node
    if count != "auto":
        return count
    if config.parallel.device == "cpu":
        return 1
    return max(1, _visible_gpus())


def threads_per_process(config: RunConfig, processes: int) -> int:
    """OpenMP threads of each process."""
    return config.parallel.cpu_threads or max(1, len(os.sched_getaffinity(0)) // processes)


def _visible_gpus() -> int:
    """GPUs by device files, so that the launcher need not load the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    return sum(1 for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit())


def _end_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
