"""The ranks of a run on this machine: `python -m yxanul_nemo.launch.ranks RANKS RUN_DIR [--callback PATH]...`.

Each rank is a worker process, which learns its place in the words of torchrun and is told every task that this process reads on its
standard input. torchrun itself would import torch before it starts the ranks, and lets all of them read from one standard input.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from yxanul_nemo.launch.processes import WORKER, ToldProcess, end_with_parent
from yxanul_nemo.machine.surroundings import free_port

GRACE_SECONDS = 30
"""How long the other ranks may take to end when one has failed."""


def main() -> int:
    """Exit code: 0, or that of the rank that failed first (a signal as 128 + N)."""
    ranks = Ranks(int(sys.argv[1]), sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda number, frame: ranks.send(signal.SIGTERM))
    signal.signal(signal.SIGALRM, lambda number, frame: ranks.send(signal.SIGKILL))
    threading.Thread(target=ranks.pass_on, daemon=True).start()
    return ranks.wait()


class Ranks:
    """A worker process for each rank; when one fails, the others are ended.

    Args:
        arguments: of each worker.
    """

    def __init__(self, count: int, arguments: Sequence[str]):
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        parent = os.getpid()
        self._processes = [
            ToldProcess(
                [sys.executable, "-m", WORKER, *arguments],
                stdin=subprocess.PIPE,
                env=os.environ | {name: str(value) for name, value in (shared | {"RANK": i, "LOCAL_RANK": i}).items()},
                # The run's lock is to be held as long as any rank lives.
                close_fds=False,
                preexec_fn=lambda: end_with_parent(parent),
            )
            for i in range(count)
        ]
        self._alive = {process.pid: rank for rank, process in enumerate(self._processes)}

    def pass_on(self) -> None:
        """Write each line of the standard input to all ranks, and close theirs at its end."""
        # Unbuffered: the interpreter cannot end while a thread that it does not wait for holds the lock of a buffer.
        with open(0, "rb", buffering=0) as tasks:
            for line in tasks:
                for process in self._processes:
                    # A rank that is gone has said why.
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.write(line)
                        process.stdin.flush()
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each rank that has not ended."""
        for pid in list(self._alive):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> int:
        """Wait until all ranks have ended; returns the exit code of the first that failed, else 0."""
        failure = 0
        while self._alive:
            pid, status = os.wait()
            rank, code = self._alive.pop(pid), os.waitstatus_to_exitcode(status)
            if code == 0 or failure:
                continue
            failure = code if code > 0 else 128 - code
            if code < 0:
                print(f"rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
            self.send(signal.SIGTERM)
            signal.alarm(GRACE_SECONDS)
        return failure


if __name__ == "__main__":
    sys.exit(main())
