"""Ends a process that hangs: its stacks go into the log, and the launcher begins the phase again from the newest checkpoint."""

import faulthandler
import os
import threading
import time
from types import TracebackType
from typing import Self

from yxanul_nemo.log import logger

EXIT_HUNG = 75
"""Exit code of a process that was ended for hanging (EX_TEMPFAIL); to the launcher it is a crash."""
STDERR = 2
"""As a descriptor, which is there whatever became of `sys.stderr`."""
CHECKS_PER_LIMIT = 20
MAX_CHECK_SECONDS = 15.0
STALLED_GRACE_SECONDS = 30.0


class Watchdog:
    """Context manager: in its block, `step_done` must be called at least every `limit_seconds`.

    A thread of this process looks at the clock. Where even that cannot run, because whoever hangs holds the interpreter's lock,
    faulthandler's own thread, which needs no lock, shows the stacks and ends the process `STALLED_GRACE_SECONDS` later.

    Args:
        limit_seconds: None: no watch is kept.
        name: of this rank, for the message.
        others: whether other ranks hang with this one. All of them show their stacks before the first one ends.
    """

    def __init__(self, limit_seconds: float | None, name: str = "", others: bool = False):
        self.limit_seconds, self.name, self.others = limit_seconds, name, others
        self._ended = threading.Event()
        self._last = time.monotonic()

    def step_done(self) -> None:
        """A step has ended just now."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self.limit_seconds is not None:
            self.step_done()
            self._thread = threading.Thread(
                target=self._watch, args=(self.limit_seconds,), name="watchdog", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self.limit_seconds is not None:
            # It may be about to set faulthandler's clock once more.
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, limit: float) -> None:
        pause = min(limit / CHECKS_PER_LIMIT, MAX_CHECK_SECONDS)
        checked = time.monotonic()
        while not self._ended.is_set():
            faulthandler.dump_traceback_later(limit + STALLED_GRACE_SECONDS, exit=True, file=STDERR)
            self._ended.wait(pause)
            now = time.monotonic()
            if now - checked > limit / 2:
                # The whole process stood still, stopped by a signal or a debugger: that is no hang of its own.
                self._last = now
            checked = now
            if now - self._last > limit and not self._ended.is_set():
                self._end(now - self._last, pause)

    def _end(self, seconds: float, pause: float) -> None:
        logger.error(
            "%s: no step for %.1f minutes (guards.hang_minutes); its stacks:", self.name or "hang", seconds / 60
        )
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        if self.others:
            # torchrun ends the other ranks as soon as one has ended; each is to show its stacks before.
            time.sleep(2 * pause)
        os._exit(EXIT_HUNG)
