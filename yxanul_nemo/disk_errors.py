"""The operating system's refusals to write, told to the user with what to do about them."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yxanul_nemo.errors import UserError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def disk_error(error: OSError, where: Path, doing: str, fix: str = "") -> UserError:
    """A `UserError` that names the folder, the step that failed and the remedy.

    Args:
        error: what the operating system said.
        where: folder or file that was being written.
        doing: the step in words, as in "saving a checkpoint".
        fix: what the user can change besides free space or permissions, as a sentence.
    """
    if error.errno in FULL:
        return UserError(
            where,
            f"no space left while {doing} ({_free_space(where)})",
            "room for the files that are written",
            f"Free space on this disk (see df -h and df -i) or raise the quota, then repeat the command. {fix}".strip(),
        )
    if error.errno in FORBIDDEN:
        return UserError(
            where,
            f"cannot be written while {doing} ({os.strerror(error.errno)})",
            "a folder that this user may write to",
            f"Mend its permissions or mount, or choose another folder with run.dir=. {fix}".strip(),
        )
    return UserError(where, f"{doing} failed ({error})", fix=fix)


@contextmanager
def disk_errors(where: Path, doing: str, fix: str = "", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn any `OSError` of the block into `disk_error(...)`; other exceptions pass.

    Args:
        where, doing, fix: see `disk_error`.
        also: exceptions by which a library reports the same, such as `safetensors.SafetensorError`; libraries written in
            Rust end their text with `(os error <errno>)`.
    """
    caught: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except caught as error:
        raise disk_error(_as_os_error(error), where, doing, fix) from error


def _as_os_error(error: Exception) -> OSError:
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error ([0-9]{1,4})\)", str(error))
    return OSError(int(number[1]), str(error)) if number else OSError(str(error))


def _free_space(where: Path) -> str:
    existing = next((path for path in (where, *where.parents) if path.exists()), Path("/"))
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return "size of the disk unknown"
    return f"{usage.free / 1e6:.1f} MB free of {usage.total / 1e6:.1f} MB"
