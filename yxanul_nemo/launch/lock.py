"""One launcher at a time in a run's folder: a kernel lock that lives as long as any process of the run."""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import textwrap
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger

LOCK_NAME = ".lock"
MAX_OWNER_BYTES = 64 << 10
MAX_SHOWN_CHARS = 200
NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""What `flock` says on a file system without locks, such as Lustre mounted without `-o flock`."""


class RunLock:
    """Context manager that holds `<run_dir>/.lock` (flock(2)) and writes into it who holds it.

    The kernel frees the lock when the last process that has the descriptor open is gone, by kill -9 as well, so there
    are no stale locks and the file is never deleted. Children that must keep it after this process get the descriptor:
    `subprocess.Popen(..., pass_fds=[lock.fd])`. On NFS a lock belongs to one process and is not shared with children.

    Raises:
        UserError: on entering, if another launcher holds it (named with process and host), or the folder is read-only.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / LOCK_NAME
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        """The open descriptor, for `pass_fds`."""
        assert self._fd is not None, "the lock is not held"
        return self._fd

    def __enter__(self) -> Self:
        assert self._fd is None, "the lock is held already"
        with disk_errors(self.path.parent, "locking the run's folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                try:
                    self._take(fd)
                    if self._is_current(fd):
                        self._sign(fd)
                        self._fd = fd
                        return self
                finally:
                    if self._fd != fd:
                        os.close(fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing, not LOCK_UN: that would free it under children which still write here.
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(fd) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "%s: no locks on this file system; take care that no second launcher uses the folder", self.path
            )

    def _is_current(self, fd: int) -> bool:
        """Whether the locked file still has its name; someone may have removed the folder between open and lock."""
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.path))
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return False

    def _sign(self, fd: int) -> None:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": shlex.join(sys.orig_argv),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner, indent=1).encode() + b"\n", 0)

    def _refusal(self, fd: int) -> UserError:
        stop = f"fuser -v {self.path}"
        try:
            owner = json.loads(os.pread(fd, MAX_OWNER_BYTES, 0))
            pid, host = int(owner["pid"]), str(owner["host"])
            command = textwrap.shorten(str(owner["command"]), MAX_SHOWN_CHARS, placeholder=" ...")
            holder = f"process {pid} on host {host} (started {owner['started']}: {command})"
        except (ValueError, TypeError, KeyError, RecursionError):
            holder = "another launcher"
        else:
            if host == socket.gethostname() and not Path("/proc", str(pid)).exists():
                holder = f"processes left behind by {holder}"
            else:
                stop = f"kill {pid}"
        return UserError(
            self.path.parent,
            f"in use by {holder}",
            "a folder of its own for each run",
            f"Wait for it, stop it (`{stop}` on that host), or choose another folder with run.dir=.",
        )
