"""Requests to stop: the step under way is finished, the state saved, and the process ends with success."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_KEYPRESS_SECONDS = 0.5
"""A SIGINT this soon after another is the same request, sent to the process by more than one sender."""


class StopNow(BaseException):
    """A request to stop where there is nothing to save."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (schedulers) and SIGINT (Ctrl-C). A second SIGINT stops at once, without saving."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._first_sigint_seconds: float | None = None
        self._at_once = False

    def install(self) -> None:
        """Take over the three signals in this process."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block a request raises `StopNow`; so does one that was made before."""
        self._at_once = True
        try:
            if self:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if self._at_once:
            raise StopNow
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_sigint_seconds is None:
                self._first_sigint_seconds = now
            elif now - self._first_sigint_seconds > SAME_KEYPRESS_SECONDS:
                raise KeyboardInterrupt

    def __bool__(self) -> bool:
        return self.reason is not None
