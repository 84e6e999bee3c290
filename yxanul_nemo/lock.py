"""One launcher at a time in a run's folder: a kernel lock that lives as long as any process of the run."""

import fcntl
import json
import os
import shlex
import socket
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.file_locks import NO_LOCKS, warn_of_no_locks
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.log import logger
from yxanul_nemo.run_folder import RunFolder
from yxanul_nemo.shared_files import open_shared

MAX_OWNER_BYTES = 64 << 10
MAX_SHOWN_CHARS = 200
POLL_SECONDS = 0.1


class RunLock:
    """Context manager that holds `<run_dir>/.lock` (flock(2)) and writes into it who holds it.

    The kernel frees the lock when the last process that has the descriptor open is gone, by kill -9 as well, so there
    are no stale locks and the file is never deleted. Children that must keep it after this process get the descriptor:
    `subprocess.Popen(..., pass_fds=[lock.fd])`. On NFS a lock belongs to one process and is not shared with children.

    Args:
        run_dir: folder of the run; made if it is absent.
        wait_seconds: how long to wait for children that a launcher on this host has left behind: they save and end.

    Raises:
        UserError: on entering, if another launcher holds it (named with process and host), or the folder is read-only.
    """

    def __init__(self, run_dir: Path, wait_seconds: float = 0.0):
        self.path = RunFolder(run_dir).lock
        self.wait_seconds = wait_seconds
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
                fd = open_shared(self.path)
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
        deadline = time.monotonic() + self.wait_seconds
        told = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = Owner.read(fd)
                if owner is None or not owner.is_gone() or time.monotonic() >= deadline:
                    raise self._refusal(owner) from None
                if not told:
                    logger.info("waiting for processes left behind by %s to save and end", owner)
                    told = True
                time.sleep(POLL_SECONDS)
                continue
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                warn_of_no_locks(self.path)
            return

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
            "start_ticks": _start_ticks(os.getpid()),
            "host": socket.gethostname(),
            "command": shlex.join(sys.orig_argv),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner, indent=1).encode() + b"\n", 0)

    def _refusal(self, owner: "Owner | None") -> UserError:
        holder, stop = str(owner or "another launcher"), f"fuser -v {self.path}"
        if owner is not None and owner.is_gone():
            holder = f"processes left behind by {holder}"
        elif owner is not None:
            stop = f"kill {owner.pid}"
        return UserError(
            self.path.parent,
            f"in use by {holder}",
            "a folder of its own for each run",
            f"Wait for it, stop it (`{stop}` on that host), or choose another folder with run.dir=.",
        )


def running_launcher(run_dir: Path) -> "Owner | None":
    """The launcher of this machine that is at work in a run's folder, by what the lock's file says; takes no lock.

    One on another machine cannot be seen from here.
    """
    try:
        fd = os.open(RunFolder(run_dir).lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        owner, held = Owner.read(fd), _is_held(os.fstat(fd))
    finally:
        os.close(fd)
    if owner is None or owner.host != socket.gethostname() or owner.is_gone():
        return None
    return owner if held else None


def _is_held(file: os.stat_result) -> bool:
    """Whether a process of this machine holds a lock on a file, by proc_locks(5); devices are left out, which file systems number
    in two ways."""
    locks = (line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines())
    return any(field.endswith(f":{file.st_ino}") for fields in locks for field in fields)


@dataclass(frozen=True)
class Owner:
    """The launcher that signed a lock's file last."""

    pid: int
    start_ticks: int | None
    host: str
    started: str
    command: str

    @classmethod
    def read(cls, fd: int) -> "Owner | None":
        try:
            written = parse_json(os.pread(fd, MAX_OWNER_BYTES, 0))
            ticks = written.get("start_ticks")
            command = textwrap.shorten(str(written["command"]), MAX_SHOWN_CHARS, placeholder=" ...")
            return cls(
                pid=int(written["pid"]),
                start_ticks=None if ticks is None else int(ticks),
                host=str(written["host"]),
                started=str(written["started"]),
                command=command,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} (started {self.started}: {self.command})"

    def is_gone(self) -> bool:
        """Whether it has ended; of another host that is not known, and taken for no."""
        if self.host != socket.gethostname():
            return False
        ticks = _start_ticks(self.pid)
        return ticks is None or (self.start_ticks is not None and ticks != self.start_ticks)


def _start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot, which tells it from a later one of the same id.

    None if there is none, or only what is left of it until its parent has asked how it ended. See proc_pid_stat(5).
    """
    try:
        # The command in parentheses may itself hold spaces and parentheses; state and the rest follow the last one.
        fields = (
            Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
