"""Files that several processes open in place, locks and logs: opened in one way, which never goes through a symbolic link.

Folders of runs and data may lie where others can write. A link that somebody puts in the place of such a file would make this
user's process empty or extend the file that it points to.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from yxanul_nemo.errors import UserError


def open_shared(path: Path) -> int:
    """Open a plain file for reading and writing, made empty if it is absent and left as it is otherwise; return its descriptor.

    Raises:
        UserError: it is a symbolic link, a folder, a named pipe or the like.
        OSError: the operating system refuses.
    """
    return _opened(path, os.O_RDWR)


def open_for_appending(path: Path) -> BinaryIO:
    """Open a plain file for appending, made if it is absent, without a buffer of our own; raises as `open_shared` does."""
    return open(_opened(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)


def _opened(path: Path, flags: int) -> int:
    expected, fix = "a plain file, or none", "Delete it; it is made anew."
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for its other end for ever.
        fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        kinds = {errno.ELOOP: "is a symbolic link", errno.EISDIR: "is a folder", errno.ENXIO: "is a named pipe"}
        if error.errno in kinds:
            raise UserError(path, kinds[error.errno], expected, fix) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(path, "is no plain file", expected, fix)
    return fd
