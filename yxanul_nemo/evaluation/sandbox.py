"""Programs that a model wrote, run in a process of their own with limits of time, memory, files and processes.

This keeps accidents away: endless loops, memory, changed files, other processes, the network. Python's audit hooks, which say no,
are no wall against an attacker; on a machine that matters, run the stage in a container.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

_BOOTSTRAP = """
import os, resource, sys
seconds, memory_bytes, mark = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
code = sys.stdin.read()
for what, limit in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 16),
):
    resource.setrlimit(what, (limit, limit))
told = os.dup(1)
quiet = os.open(os.devnull, os.O_WRONLY)
os.dup2(quiet, 1)
os.dup2(quiet, 2)
del sys.argv[1:]
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
denied = (
    "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove",
    "os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system", "os.truncate", "os.utime", "ctypes.", "shutil.", "signal.",
    "socket.", "subprocess.", "resource.", "pty.", "fcntl.", "mmap.",
)
def watch(event, values):
    if event.startswith(denied) or (event == "open" and isinstance(values[2], int) and values[2] & writing):
        raise PermissionError(event)
sys.addaudithook(watch)
exec(compile(code, "program", "exec"), {"__name__": "__main__"})
os.write(told, mark.encode())
"""
"""Reads the program, gives up what it can, and tells a mark that the program does not know only when it has come to its end."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    kind: Literal["passed", "failed", "out of time"]


def run_program(code: str, time_limit_seconds: float, memory_limit_bytes: int) -> Outcome:
    """Run Python code with nothing but the standard library; `passed` if it comes to its end without an exception.

    Its output is thrown away, its folder is empty and its environment too.
    """
    mark = secrets.token_hex(16)
    limits = [str(int(time_limit_seconds) + 1), str(memory_limit_bytes), mark]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _BOOTSTRAP, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder},
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(code.encode(errors="replace"), timeout=time_limit_seconds)
        except subprocess.TimeoutExpired:
            return Outcome("out of time")
        finally:
            _end(process)
    return Outcome("passed" if told.decode() == mark and process.returncode == 0 else "failed")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
