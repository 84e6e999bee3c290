"""Processes that hang are ended with their stacks; those that work, or were stopped as a whole, are not."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import CONTEXT

LIMIT_SECONDS = 0.4


def work(kind: str, log: Path, grace_seconds: float) -> None:
    """A process whose watchdog allows `LIMIT_SECONDS` for a step."""
    from yxanul_nemo.log import configure_logging
    from yxanul_nemo.training import watchdog

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    configure_logging()
    watchdog.STALLED_GRACE_SECONDS = grace_seconds
    with watchdog.Watchdog(None if kind == "off" else LIMIT_SECONDS, "rank 0") as watch:
        if kind == "steps":
            for _ in range(8):
                time.sleep(LIMIT_SECONDS / 4)
                watch.step_done()
        elif kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "sleep" or kind == "off":
            time.sleep(60 if kind == "sleep" else 3 * LIMIT_SECONDS)
        else:
            # Unlike CDLL, PyDLL keeps the interpreter's lock.
            ctypes.PyDLL(None).sleep(60)
    time.sleep(2 * LIMIT_SECONDS)
    os._exit(0)


@pytest.mark.parametrize(
    ("kind", "exit_code", "said"),
    [
        ("sleep", 75, "rank 0: no step for"),
        # By faulthandler's clock, which shows all threads and ends with 1.
        ("lock", 1, "Timeout (0:00:0"),
        ("steps", 0, ""),
        ("stopped", 0, ""),
        ("off", 0, ""),
    ],
)
def test_what_hangs_is_ended_and_nothing_else(tmp_path: Path, kind: str, exit_code: int, said: str) -> None:
    log = tmp_path / "log"
    process = CONTEXT.Process(target=work, args=(kind, log, 0.5 if kind == "lock" else 60.0))
    process.start()
    if kind == "stopped":
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        time.sleep(3 * LIMIT_SECONDS)
        os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == exit_code
    text = log.read_text()
    assert said in text and bool(text) == bool(said)
    if said:
        assert "in work" in text and __file__ in text
