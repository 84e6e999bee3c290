"""How far preparation is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from data_prep.corpus.encode import Progress
from yxanul_nemo.log import logger

LOG_INTERVAL_SECONDS = 10.0


class ProgressDisplay:
    """Show rows, MB/s of text, tokens/s and the time left; `total_rows` is what the shards' footers add up to."""

    def __init__(self, total_rows: int, total_shards: int):
        self.total_rows, self.total_shards = total_rows, total_shards
        self.rows = self.text_bytes = self.tokens = self.shards = 0
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("tokenizing"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows, {task.fields[rates]},"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self.total_rows, rates="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.shards:
            logger.info(
                "tokenized %d of %d shards: %s rows, %s bytes of text, %s tokens in %.1f s (%s)",
                self.shards,
                self.total_shards,
                f"{self.rows:,}",
                f"{self.text_bytes:,}",
                f"{self.tokens:,}",
                self.seconds,
                self.rates(),
            )

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def rates(self) -> str:
        """Speed since the start."""
        return f"{self.text_bytes / self.seconds / 1e6:.1f} MB/s {self.tokens / self.seconds / 1e3:,.0f}k tokens/s"

    def advance(self, progress: Progress) -> None:
        """Count work done and show it."""
        self.rows += progress.rows
        self.text_bytes += progress.text_bytes
        self.tokens += progress.tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.rows, rates=self.rates())
        elif time.monotonic() - self._last_line >= LOG_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            left = self.seconds * (self.total_rows - self.rows) / max(1, self.rows)
            logger.info(
                "tokenizing: %d of %d shards, %.0f%% of rows, %s, %.0f s left",
                self.shards,
                self.total_shards,
                100 * self.rows / max(1, self.total_rows),
                self.rates(),
                left,
            )

    def shard_done(self) -> None:
        self.shards += 1
