"""Stages in order, and what the launcher says and ends with where something stands in its way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.launching import REPO_DIR, Launched, command, launch, state
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.stages import selected_stages
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.lock import RunLock

HEAVY = {"torch", "megatron", "lightning", "nemo", "transformers"}


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    """A run that is ready to train."""
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / "run" / part)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("all", ["fetch", "data", "train", "validate", "export"]),
        ("validate", ["validate"]),
        (["export", "train"], ["train", "export"]),
        (["export", "all", "export"], ["fetch", "data", "train", "validate", "export"]),
    ],
)
def test_stages_are_selected_in_the_order_of_the_pipeline(stage: str | list[str], expected: list[str]) -> None:
    assert selected_stages(stage) == expected


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("trian", r"stage: no stage 'trian'.*Did you mean 'train'\?"),
        (["data", "exprot"], "Did you mean 'export'"),
        ([], "empty"),
        (["plan", "train"], "plan alone"),
    ],
)
def test_wrong_stages_are_refused(stage: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        selected_stages(stage)


@pytest.mark.parametrize("task", [Task("train", 1), Task("train", 12), Task("validate"), Task("export")])
def test_a_task_is_read_back_from_its_name(task: Task) -> None:
    assert Task.named(task.name) == task


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "python launcher.py recipe=NAME stage=STAGE"),
        (["optim.lrate=1"], 2, r"error: optim\.lrate: no such key.*Did you mean 'optim\.lr'\?"),
        (
            ["callbacks=[tests.watching.Hookless]", "stage=train"],
            2,
            "error: callbacks: tests.watching.Hookless has none of",
        ),
        (["stage=trian"], 2, r"error: stage: no stage 'trian'.*Did you mean 'train'\?"),
        (["stage=train"], 2, r"error: \S+/data/manifest\.json: does not exist.*python launcher\.py stage=data"),
        (["stage=[export]"], 2, r"error: \S+/checkpoints: holds no checkpoint.*python launcher\.py stage=train"),
    ],
)
def test_mistakes_are_answered_before_anything_heavy_is_imported(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    with_times = [sys.executable, "-X", "importtime", *command(f"run.dir={tmp_path / 'run'}", *arguments)[1:]]
    done = subprocess.run(with_times, cwd=REPO_DIR, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert "yxanul_nemo" in imported and not imported & HEAVY
    said = done.stdout + "\n".join(line for line in lines if not line.startswith("import time:"))
    assert done.returncode == code, said
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not list(tmp_path.glob("run/logs/phase*")), "no worker was at work"


def test_a_second_launcher_is_refused_with_the_owner_named(run_dir: Path) -> None:
    with RunLock(run_dir):
        done = launch("stage=train", f"run.dir={run_dir}")
    assert done.returncode == 2
    assert f"process {os.getpid()} on host {os.uname().nodename}" in done.stdout and "Traceback" not in done.stdout


def test_validation_files_are_looked_at_before_training(run_dir: Path) -> None:
    done = launch("stage=train", f"run.dir={run_dir}", "+validation.domains.extra={path: absent.parquet}")
    assert done.returncode == 2, done.stdout
    assert "validation.domains.extra.path: validation/absent.parquet does not exist" in done.stdout
    assert not (run_dir / "config.yaml").exists() and not list(run_dir.glob("logs/phase*"))


def test_a_format_that_the_tokenizer_cannot_have_is_refused_before_training(run_dir: Path) -> None:
    path = run_dir / "tokenizer" / "tokenizer.json"
    described = json.loads(path.read_text())
    described["pre_tokenizer"]["pretokenizers"].pop(0)
    path.write_text(json.dumps(described))
    done = launch("stage=[train,export]", f"run.dir={run_dir}", "export.formats=[gguf]")
    assert done.returncode == 2, done.stdout
    assert (
        "export.formats: has gguf, and the tokenizer cuts text in a way that llama.cpp has no name for" in done.stdout
    )
    assert not list(run_dir.glob("logs/phase*"))


def test_training_on_shared_tokens_looks_for_their_tokenizer_first(prepared: Path, tmp_path: Path) -> None:
    done = launch("stage=train", f"run.dir={tmp_path}", f"data.dir={prepared}/data")
    assert done.returncode == 2 and "tokenizer: does not exist, though the tokens are prepared" in done.stdout
    assert not list(tmp_path.glob("logs/phase*"))


def test_status_is_of_the_run_and_not_of_the_command_line(run_dir: Path, make_config: Callable[..., RunConfig]) -> None:
    nothing = launch("stage=status", f"run.dir={run_dir}/absent")
    assert nothing.returncode == 2 and "holds no run" in nothing.stdout
    own = make_config(f"run.dir={run_dir}", "curriculum.total_tokens=9216")
    (run_dir / "config.yaml").write_text(to_yaml(own))
    done = launch("stage=status", f"run.dir={run_dir}", "curriculum.total_tokens=18432")
    assert done.returncode == 0, done.stdout
    assert "0 of 9,216" in done.stdout and "18,432" not in done.stdout
    assert "the command line's differ in curriculum.phases.0.tokens: 2048 there, 4096 here" in done.stdout


def test_an_early_stop_ends_training_and_the_chain_goes_on(run_dir: Path) -> None:
    settings = (
        "validation.every_tokens=1024",
        "validation.early_stop_patience=1",
        "validation.early_stop_min_improvement=50",
        "callbacks=[tests.watching.Watcher]",
    )
    for first in (True, False):
        done = launch("stage=[train,validate]", f"run.dir={run_dir}", *settings)
        assert done.returncode == 0, done.stdout
        assert "phase-02: done already" in done.stdout and "phase-03: done already" in done.stdout
        names = sorted(path.name for path in (run_dir / "checkpoints").glob("tokens_*"))
        assert names == ["tokens_000000000002048"], "the second validation inside the phase ended it"
        assert (run_dir / "validation" / f"{names[0]}.json").is_file()
        assert names[0] in (run_dir / "checkpoints" / "best").read_text()
        assert "callbacks" not in (run_dir / "config.yaml").read_text()
        calls = [json.loads(line) for line in (run_dir / "calls.jsonl").read_text().splitlines()]
        assert [call["tokens"] for call in calls if call["hook"] == "on_save_checkpoint"] == [2048]
        if first:
            assert "stopped by early stop (mean_bits_per_byte did not improve 1 times) at 2,048 tokens" in done.stdout
        else:
            assert "phase-01: done already" in done.stdout and "validate: done already" in done.stdout


def test_a_signal_during_imports_ends_all_at_once_and_leaves_the_mark_of_preemption(
    run_dir: Path, tmp_path: Path
) -> None:
    for name, code, marked in (("SIGTERM", 0, True), ("SIGINT", 130, False)):
        launched = Launched(tmp_path / "output", "stage=train", f"run.dir={run_dir}")
        worker = launched.worker()
        launched.process.send_signal(signal.Signals[name])
        assert launched.end() == code
        assert f"stopped by {name}" in launched.text and "Repeat the command" in launched.text
        with RunLock(run_dir, wait_seconds=60):
            assert state(worker) in "ZX", "the worker is gone with it"
        assert (run_dir / "preempted").exists() == marked


def test_a_worker_that_crashes_twice_ends_the_run_with_the_logs_name(run_dir: Path, tmp_path: Path) -> None:
    launched = Launched(tmp_path / "output", "stage=train", f"run.dir={run_dir}")
    first = launched.worker()
    os.kill(first, signal.SIGKILL)
    launched.wait_until_printed("phase-01 was killed by SIGKILL; trying once more from the last good checkpoint")
    os.kill(launched.worker(other_than=first), signal.SIGKILL)
    assert launched.end() == 1
    assert "phase-01 failed twice (the last time it was killed by SIGKILL)" in launched.text
    assert str(run_dir / "logs" / "phase-01.log") in launched.text
    assert "Traceback" not in launched.text


def test_a_killed_launcher_leaves_no_idle_worker(run_dir: Path, tmp_path: Path) -> None:
    launched = Launched(tmp_path / "output", "stage=train", f"run.dir={run_dir}")
    worker = launched.worker()
    launched.process.kill()
    launched.process.wait()
    with RunLock(run_dir, wait_seconds=60):
        assert state(worker) in "ZX"


def test_a_failure_of_our_own_ends_with_1_and_a_traceback(tmp_path: Path) -> None:
    """Here an installed package is broken."""
    (tmp_path / "pyarrow.py").write_text("raise RuntimeError('a broken build')")
    done = launch("stage=data", f"run.dir={tmp_path / 'run'}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "RuntimeError: a broken build" in done.stdout and "Traceback" in done.stdout


def test_the_lock_waits_for_what_a_killed_launcher_has_left_and_then_gives_up(tmp_path: Path) -> None:
    hold = (
        "import subprocess, sys; from pathlib import Path; from yxanul_nemo.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])) as lock: child = subprocess.Popen(['sleep', sys.argv[2]], pass_fds=[lock.fd])\n"
        "print(child.pid)"
    )

    def leave_behind(seconds: float) -> int:
        arguments = [sys.executable, "-c", hold, str(tmp_path), str(seconds)]
        process = subprocess.Popen(arguments, cwd=REPO_DIR, stdout=subprocess.PIPE, text=True)
        with process.stdout:
            child = int(process.stdout.readline())
        process.wait()
        return child

    leave_behind(0.5)
    with RunLock(tmp_path, wait_seconds=60):
        pass
    child = leave_behind(60)
    began = time.monotonic()
    with pytest.raises(UserError, match="left behind"), RunLock(tmp_path, wait_seconds=0.3):
        pass
    assert time.monotonic() - began >= 0.3
    os.kill(child, signal.SIGKILL)
