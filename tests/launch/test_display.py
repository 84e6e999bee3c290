"""What a terminal and a file get of a task's output."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.launch.display import TaskDisplay
from yxanul_nemo.launch.interrupts import StopSignals
from yxanul_nemo.launch.processes import CONTROL, Workers
from yxanul_nemo.launch.tasks import Task

RECORD = {
    "loss_nats_per_token": 6.5235, "bits_per_byte": 2.4972, "learning_rate": 2.86e-3, "grad_norm": 0.72, "grad_clip": 1.0,
    "tokens_per_second": 11321.0, "peak_memory_bytes": 3 << 30, "skipped_steps": 0, "tokens_total": 7168,
    "phase_seconds_left": 125.0, "run_seconds_left": 3725.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def shown(
    config: RunConfig,
    *told: tuple[bytes, dict | None],
    terminal: bool,
    task: Task | None = None,
    signals: StopSignals | None = None,
) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140)
    with TaskDisplay(config, task or Task("train", 2), signals or StopSignals(), console) as display:
        for text, progress in told:
            display.text(text, progress)
    return console.file.getvalue()


def test_on_a_terminal_a_phase_has_bars_and_its_newest_record(make_config: Callable[..., RunConfig]) -> None:
    text = shown(make_config(), (b"saved it\n", None), (b"the record's line", RECORD), terminal=True)
    assert "saved it" in text and "the record's line" not in text
    # 4,096 of the run's tokens are the first phase's.
    assert "phase 2/3: 64 tokens" in text and "3.072k/6.144k tokens" in text and "7.168k/18.43k tokens" in text
    assert "2:05 left" in text and "1:02:05 left" in text and " 50%" in text
    for figure in ("6.5235", "2.4972", "2.86e-03", "0.72 (clip 1)", "11,321 tokens/s", "3.0 GiB"):
        assert figure in text
    assert "MFU" not in text and "skipped" not in text


def test_what_is_known_besides_is_shown_and_what_is_not_a_number_is_not(make_config: Callable[..., RunConfig]) -> None:
    record = RECORD | {"mfu": 0.4131, "device_memory_bytes": 80 << 30, "loss_nats_per_token": None, "skipped_steps": 3}
    text = shown(make_config(), (b"line", record), terminal=True)
    assert "41.3%" in text and "3.0/80.0 GiB" in text and "3 steps skipped" in text and "None" not in text


def test_ctrl_c_is_answered_below_the_bars(make_config: Callable[..., RunConfig]) -> None:
    signals = StopSignals()
    signals.received = signal.SIGINT
    text = shown(make_config(), (b"line", RECORD), terminal=True, signals=signals)
    assert "stopping after this step to save; Ctrl-C again stops at once" in text and signals.announces
    assert "stopping" not in shown(make_config(), (b"line", RECORD), terminal=True)


@pytest.mark.parametrize(("terminal", "task"), [(False, Task("train", 2)), (True, Task("export"))])
def test_elsewhere_lines_are_passed_on(
    make_config: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str], terminal: bool, task: Task
) -> None:
    drawn = shown(make_config(), (b"saved it\n", None), (b"the record's line", RECORD), terminal=terminal, task=task)
    assert drawn == ""
    assert capfd.readouterr().err == "saved it\nthe record's line\n"


def test_a_record_is_a_line_in_the_log_and_never_its_json(
    make_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A process says what a worker says; `Workers` reads it as it reads a worker's."""
    says = b"before\n" + b"12:00:00 the record" + CONTROL + b"progress " + json.dumps(RECORD).encode() + b"\nafter\n"
    says += CONTROL + b"end 0\n"
    script = f"import os; os.read(0, 1000); os.write(1, {says!r})"
    workers = Workers(make_config(f"run.dir={tmp_path}"), lock_fd=2, signals=StopSignals())
    workers._waiting[1] = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert workers.run(Task("train", 1), after=None) == 0
    workers.close()
    expected = "before\n12:00:00 the record\nafter\n"
    assert (tmp_path / "logs" / "phase-01.log").read_text() == expected
    assert capfd.readouterr().err == expected
    assert list(workers.last_lines) == expected.splitlines()
