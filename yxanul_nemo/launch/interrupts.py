"""Signals to the launcher: passed on to the task at work, which saves and ends; without one they end the launcher's own work."""

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
BY_HAND = (signal.SIGINT, signal.SIGHUP)
"""Ctrl-C and a terminal that was closed; the others come from schedulers."""
ASKED_TO_STOP = b"\nstopping after this step to save; Ctrl-C again stops at once, without saving\n"


class Interrupted(BaseException):
    """A stop signal arrived while no task was at work."""


class StopSignals:
    """Context manager that takes over SIGINT (Ctrl-C), SIGHUP (the terminal is closed), SIGTERM and SIGUSR1 (schedulers) in this process.

    One that is ignored from the beginning stays so: `nohup` means the run to go on.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.announces = True
        """Whether Ctrl-C is answered with a line; a display that draws over the terminal says it itself."""
        self._pids: set[int] = set()

    def __enter__(self) -> Self:
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def task_began(self, pid: int) -> None:
        """From now on signals go to this process of the task; one that has arrived already does so at once."""
        self._pids.add(pid)
        if self.received is not None:
            _send(pid, self.received)

    def task_ended(self) -> None:
        """The task's processes are gone."""
        self._pids.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if not self._pids:
            raise Interrupted
        if number == signal.SIGINT and self.announces:
            # Not print or logging: this may run in the middle of another write to the same stream.
            with contextlib.suppress(OSError):
                os.write(2, ASKED_TO_STOP)
        for pid in self._pids:
            _send(pid, number)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        # torchrun and srun know no terminal.
        os.kill(pid, signal.SIGTERM if number == signal.SIGHUP else number)
