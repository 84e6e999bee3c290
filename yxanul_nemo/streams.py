"""Standard output and error that outlive their reader: a closed pipe, a terminal that is gone or a full disk behind them ends no run."""

import io
import os
import select
import sys
from collections.abc import Buffer
from pathlib import Path

STANDARD = {0: os.O_RDONLY, 1: os.O_WRONLY, 2: os.O_WRONLY}


class _Output:
    """Where this process prints to, and where it would go on."""

    is_heard = True
    next_targets: tuple[Path, ...] = (Path(os.devnull),)


class _Stream(io.RawIOBase):
    """A file descriptor that is written to as long as that works, and then leads elsewhere."""

    def __init__(self, fd: int):
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: Buffer) -> int:
        return _write(self._fd, bytes(data))


def outlive_reader(log_path: Path | None = None) -> None:
    """Let this process go on when what it prints cannot be written any more.

    From then on both streams lead into the file `log_path`, or nowhere without one. Descriptors that were closed from the beginning
    lead nowhere, so that no file which the process opens gets their number, and with it what is printed.
    """
    for fd, mode in STANDARD.items():
        try:
            os.fstat(fd)
        except OSError:
            _lead(fd, os.open(os.devnull, mode))
    _Output.is_heard, _Output.next_targets = True, (*([log_path] if log_path else []), Path(os.devnull))
    for name, fd in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not None:
            before.flush()
        made = io.TextIOWrapper(
            io.BufferedWriter(_Stream(fd)),
            encoding=getattr(before, "encoding", None) or "utf-8",
            # The name of a file may be no text.
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, made)


def say(line: bytes, told: bytes = b"") -> None:
    """Write a line to standard output in one piece (up to 4,096 bytes into a pipe are one).

    Args:
        told: what stands behind it for the process that reads; left out where none does.
    """
    sys.stdout.flush()
    alone = line + b"\n" if line else b""
    _write(1, line + told + b"\n" if _Output.is_heard else alone, alone)


def _write(fd: int, data: bytes, unheard: bytes | None = None) -> int:
    """As `os.write`, but where that fails the descriptor is made to lead elsewhere, and `unheard` (unset: the data) goes there."""
    while True:
        try:
            return os.write(fd, data)
        except BlockingIOError:
            # Another program that shares the terminal has made it so.
            select.select([], [fd], [])
        except OSError as error:
            _lead_elsewhere(error)
            data = data if unheard is None else unheard


def _lead_elsewhere(error: OSError) -> None:
    first, *others = _Output.next_targets
    target = _open_log(first)
    for fd in (1, 2):
        os.dup2(target, fd)
    os.close(target)
    _Output.is_heard = False
    if others:
        _Output.next_targets = tuple(others)
        _write(2, f"nobody reads what this process prints ({error.strerror}); it goes on here\n".encode())


def _open_log(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError:
        # The folder is gone or cannot be written to: the work counts more than its words.
        return os.open(os.devnull, os.O_WRONLY)


def _lead(fd: int, target: int) -> None:
    if target != fd:
        os.dup2(target, fd)
        os.close(target)
