"""Requests to stop: the step under way is finished, the state saved, and the process ends with success."""

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (schedulers) and SIGINT (Ctrl-C). A second SIGINT stops at once, without saving."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def install(self) -> None:
        """Take over the three signals in this process."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == signal.Signals(number).name:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.reason is not None
