"""What the project says: one logger, with short lines on the console and full ones in `<run.dir>/logs/`, and tables on standard output."""

import io
import logging
import os
import sys
import warnings
from pathlib import Path

from rich.console import Console

from yxanul_nemo.shared_files import open_for_appending

logger = logging.getLogger("yxanul")
FILE_WIDTH = 150
"""Columns of a table that does not go to a terminal."""
NOISY_LOGGERS = (
    "megatron",
    "nemo",
    "nemo_logger",
    "torch.utils.cpp_extension",
    "lightning",
    "lightning.pytorch",
    "torch.distributed",
)


class _LogFile(logging.StreamHandler[io.TextIOWrapper]):
    """Appends to a file, as `logging.FileHandler` does, which would follow a symbolic link."""

    def __init__(self, path: Path):
        super().__init__(io.TextIOWrapper(open_for_appending(path), encoding="utf-8", write_through=True))

    def close(self) -> None:
        """Close the file, too."""
        super().close()
        self.stream.close()


def configure_logging(log_file: Path | None = None, console: bool = True, level: int = logging.INFO) -> None:
    """Send the project's log to the console (standard error) and, if named, append it to `log_file`."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    logger.propagate = False
    if console:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(process)d %(message)s"))
        logger.addHandler(handler)


def quiet_libraries() -> None:
    """Libraries warn at import about optional parts that are absent by choice; the log is for the run."""
    warnings.filterwarnings("ignore")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def table_console() -> Console:
    """A console for tables: as wide as the terminal, and `FILE_WIDTH` where output goes elsewhere and COLUMNS says nothing."""
    is_unknown = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=FILE_WIDTH if is_unknown else None, highlight=False)
