"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the folder."""

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from yxanul_nemo.errors import UserError

HASH_CHUNK_BYTES = 4 << 20


def require_inside(path: str) -> str:
    """Return a path that a file names, if it is one below the file's own folder, in its shortest form; ValueError otherwise."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or str(PurePosixPath(path)) != path or "\0" in path:
        raise ValueError(f"{path!r} is not a plain path below the folder of this file")
    return path


def read_bounded(path: Path, max_bytes: int, expected: str = "", fix: str = "") -> bytes:
    """Return the bytes of a plain file of at most `max_bytes`; UserError, with `expected` and `fix`, if it is none."""
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for a writer for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as handle:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UserError(path, "is no plain file", expected, fix)
            raw = handle.read(max_bytes + 1)
    except FileNotFoundError:
        raise UserError(path, "no such file", expected, fix) from None
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", expected, fix) from None
    if len(raw) > max_bytes:
        raise UserError(path, f"has more than {max_bytes:,} bytes", expected, fix)
    return raw


def fsync_dir(path: Path) -> None:
    """Make renames and removals inside `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write `path` through a temporary file beside it; it appears under its name only when complete and on disk.

    The temporary name starts with a dot and ends with `.tmp`; an exception removes it and leaves any old file as it was. The
    user's umask says who may read the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def allow_as_umask(path: Path) -> None:
    """Give a file that a library has made private the mode of any other new file of this user."""
    # Asked of the kernel: os.umask can only be read by changing it, for all threads.
    told = re.search(
        r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(encoding="ascii", errors="replace"), re.MULTILINE
    )
    umask = int(told[1], 8) if told else 0o077
    path.chmod(0o666 & ~umask)


def write_text_atomic(path: Path, text: str) -> None:
    """`atomic_file` for text in UTF-8."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """`atomic_file` for JSON, indented, keys in the order given."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
