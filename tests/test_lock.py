"""The run's lock, against real processes that hold it, die and leave children."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yxanul_nemo.errors import UserError
from yxanul_nemo.lock import RunLock
from yxanul_nemo.run_folder import RunFolder

REPO_DIR = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from yxanul_nemo.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
HOLD_WITH_CHILD = """
import subprocess, sys, time
from pathlib import Path
from yxanul_nemo.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fd])
    print(child.pid, flush=True)
    if sys.argv[2] == "stay":
        time.sleep(60)
"""


def start(code: str, *arguments: object) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=REPO_DIR, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def wait_until_free(run_dir: Path) -> None:
    """The kernel frees a lock a moment after the kill; give up after 20 s."""
    for _ in range(2000):
        try:
            with RunLock(run_dir):
                return
        except UserError:
            time.sleep(0.01)
    pytest.fail("the lock stayed held")


def test_second_launcher_is_told_who_holds_it(tmp_path):
    process, word = start(HOLD, tmp_path)
    try:
        assert word == "held"
        with pytest.raises(UserError) as caught, RunLock(tmp_path):
            pass
    finally:
        stop(process)
    message = str(caught.value)
    assert f"process {process.pid} on host {socket.gethostname()}" in message
    assert f"kill {process.pid}" in message and str(tmp_path) in message and "started 20" in message


def test_kill_minus_9_leaves_no_stale_lock(tmp_path):
    process, _ = start(HOLD, tmp_path)
    stop(process)
    assert str(process.pid) in RunFolder(tmp_path).lock.read_text()
    with RunLock(tmp_path):
        assert f'"pid": {os.getpid()}' in RunFolder(tmp_path).lock.read_text()


@pytest.mark.parametrize("end", ["killed", "exited"])
def test_lock_lives_as_long_as_a_child_that_has_the_descriptor(tmp_path, end):
    process, child = start(HOLD_WITH_CHILD, tmp_path, "stay" if end == "killed" else "leave")
    try:
        if end == "killed":
            process.kill()
        process.wait()
        with pytest.raises(UserError, match=f"left behind by process {process.pid}.*fuser -v"), RunLock(tmp_path):
            pass
    finally:
        os.kill(int(child), signal.SIGKILL)
        stop(process)
    wait_until_free(tmp_path)


def test_descriptor_is_not_inherited_unasked(tmp_path):
    with RunLock(tmp_path) as lock:
        assert not os.get_inheritable(lock.fd)
        child = subprocess.Popen(["sleep", "60"])
    try:
        with RunLock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_same_process_cannot_take_it_twice(tmp_path):
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} "), RunLock(tmp_path):
        pass


def test_makes_the_folder_and_can_be_taken_again(tmp_path):
    lock = RunLock(tmp_path / "runs" / "new")
    for _ in range(2):
        with lock:
            assert RunFolder(tmp_path / "runs" / "new").lock.is_file()


def test_an_error_inside_frees_it(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError("training failed")
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1, 2]", b'{"pid": "x"}', b"[" * 65536])
def test_unreadable_owner_is_still_an_owner(tmp_path, content):
    with RunLock(tmp_path):
        RunFolder(tmp_path).lock.write_bytes(content)
        with pytest.raises(UserError, match="another launcher"), RunLock(tmp_path):
            pass


def test_garbage_of_an_earlier_owner_is_overwritten(tmp_path):
    RunFolder(tmp_path).lock.write_bytes(b"x" * 100_000)
    with RunLock(tmp_path):
        assert RunFolder(tmp_path).lock.read_text().startswith("{")
        assert RunFolder(tmp_path).lock.stat().st_size < 10_000


def test_follows_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").lock.symlink_to(victim)
    with pytest.raises(UserError, match="is a symbolic link"), RunLock(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"


def test_run_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run"), RunLock(tmp_path / "run"):
        pass


def test_folder_removed_between_open_and_lock_is_made_anew(tmp_path, monkeypatch):
    """A lock on a file without a name would keep nobody out."""
    flock = fcntl.flock

    def remove_then_flock(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(tmp_path / "run")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_flock)
    with RunLock(tmp_path / "run"), pytest.raises(UserError, match="in use"), RunLock(tmp_path / "run"):
        pass


def test_read_only_folder_is_named(tmp_path):
    done = subprocess.run(["mount", "--bind", tmp_path, tmp_path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path], check=True)
        with pytest.raises(UserError, match=r"cannot be written while locking.*Read-only"), RunLock(tmp_path):
            pass
        with pytest.raises(UserError, match=r"cannot be written while locking.*Read-only"), RunLock(tmp_path / "new"):
            pass
    finally:
        subprocess.run(["umount", tmp_path], check=True)
