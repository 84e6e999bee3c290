"""Kernel locks on files, which end with the process that holds them: no lock is ever stale."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yxanul_nemo.log import logger
from yxanul_nemo.shared_files import open_shared

NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""What `flock` says on a file system without locks, such as Lustre mounted without `-o flock`."""


@contextmanager
def only_process(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of the file `path` (flock(2)), which the kernel drops when this process ends, however it ends.

    Args:
        wait: for the process that holds it now; otherwise BlockingIOError is raised.

    Raises:
        BlockingIOError, and what `open_shared` raises.
    """
    fd = open_shared(path)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn_of_no_locks(path)
        yield
    finally:
        os.close(fd)


def warn_of_no_locks(path: Path) -> None:
    """Say that the user must take the lock's part."""
    logger.warning("%s: no locks on this file system; take care that no second process uses the folder", path)
