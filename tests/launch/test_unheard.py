"""Nobody listens any more: the launcher is killed, its terminal is closed, its reader is gone. Nothing trained is lost, logs say why."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.launching import REPO_DIR, Launched, command
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.lock import RunLock

LONG = ("curriculum.phases.0.tokens=10M", "data.max_epochs=1000", "checkpoint.every_tokens=1B", "stage=train")


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    """A run that is ready to train."""
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / "run" / part)
    return tmp_path / "run"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_what_was_trained_is_saved_without_a_launcher_or_a_terminal(
    run_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    launched = Launched(tmp_path / "output", *LONG, f"run.dir={run_dir}")
    launched.wait_until_printed("step     2/")
    launched.process.send_signal(number)
    code = launched.process.wait(60)
    with RunLock(run_dir, wait_seconds=60):
        (checkpoint,) = CheckpointStore(run_dir / "checkpoints").list()
    assert checkpoint.tokens >= 1024
    log = (run_dir / "logs" / "phase-01.log").read_text()
    assert f"stopped by SIGTERM at {checkpoint.tokens:,} tokens, saved" in log
    assert "Traceback" not in log and "\0" not in log
    if number == signal.SIGKILL:
        assert "nobody reads what this process prints (Broken pipe)" in log
    else:
        assert code == 128 + signal.SIGHUP and "stopped by SIGHUP in phase-01: the state is saved." in launched.text
        assert not (run_dir / "preempted").exists()


def test_a_run_without_reader_home_or_peace_from_other_launchers_goes_on_to_its_end(
    run_dir: Path, tmp_path: Path
) -> None:
    """`2>&1 | head -1`, in a container of an operator that gives the first of two pods its place."""
    left = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500", "PET_NNODES": "2"}
    process = subprocess.Popen(
        command(f"run.dir={run_dir}", "stage=[train,validate]"),
        cwd=REPO_DIR,
        env=os.environ | left | {"HOME": "/nonexistent", "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(240) == 0
    assert "done: " in (run_dir / "logs" / "launcher.log").read_text()
    assert "/nonexistent cannot be written: caches" in (run_dir / "logs" / "launcher.log").read_text()
    for number in (1, 2, 3):
        log = (run_dir / "logs" / f"phase-0{number}.log").read_text()
        assert f"phase {number}/3" in log and "nobody reads" not in log
