"""The steps of training a tokenizer as they go by: a bar for each on a terminal, a line for each in the log elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from yxanul_nemo.log import logger


class TrainingDisplay:
    """A context in which steps are shown one after another."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(show_speed=True),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show `title` while the block runs; it is given a function that takes how much of `total` is done."""
        task = self._bars.add_task(title, total=total)
        started = time.monotonic()
        yield lambda done: self._bars.update(task, completed=done)
        self._bars.update(task, total=total or 1, completed=total or 1)
        if self._bars.disable:
            logger.info("%s: %.1f s", title, time.monotonic() - started)
