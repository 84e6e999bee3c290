"""One logger for the whole project: short lines on the console, full ones in `<run.dir>/logs/`."""

import logging
import sys
from pathlib import Path

logger = logging.getLogger("yxanul")


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
        handler = logging.FileHandler(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(process)d %(message)s"))
        logger.addHandler(handler)
