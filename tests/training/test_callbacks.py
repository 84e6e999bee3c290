"""A user's callbacks in real small runs, named by import path."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training import sessions
from tests.training.runs import PHASES, STEPS, TOTAL, MakeRun, assert_equal_runs, lines, newest, records
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.user_callbacks import HOOKS, check_callbacks, load_callbacks


def train_with(config: RunConfig, phases: tuple[int, ...], paths: list[str]) -> list[bool] | str:
    """Train phases with callbacks as a worker makes them; the user's error if there is one."""
    from yxanul_nemo.training.loop import train_phase
    from yxanul_nemo.training.prepare import prepare_phase
    from yxanul_nemo.training.signals import StopRequest

    callbacks, stop = load_callbacks(paths), StopRequest()
    try:
        return [train_phase(prepare_phase(config, number), stop, callbacks=callbacks) for number in phases]
    except UserError as error:
        return str(error)


def lightning_hooks() -> tuple[list[str], str]:
    """Those of our hooks that Lightning's base class lacks, and what is said of a callback of Lightning's that needs more than ours."""
    from lightning.pytorch.callbacks import Callback

    with pytest.raises(UserError) as refused:
        check_callbacks(["lightning.pytorch.callbacks.DeviceStatsMonitor"])
    return [hook for hook in HOOKS if not hasattr(Callback, hook)], str(refused.value)


def calls(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run.dir / "calls.jsonl").read_text().splitlines()]


def test_each_hook_is_called_and_the_run_is_the_same(make_run: MakeRun, straight: RunConfig) -> None:
    config = make_run("validation.every_tokens=3072")
    plain = make_run("validation.every_tokens=3072")
    assert run_ranks(train_with, 1, config, PHASES, ["tests.watching.Watcher"]) == [[True] * 3]
    assert run_ranks(sessions.train, 1, plain, PHASES) == [[True] * 3]
    assert_equal_runs(config, plain)
    assert_equal_runs(config, straight)
    seen = calls(config)
    counts = Counter(call["hook"] for call in seen)
    assert counts["on_train_start"] == counts["on_train_end"] == len(PHASES)
    assert counts["on_train_batch_start"] == counts["on_train_batch_end"] == STEPS
    steps = [call for call in seen if call["hook"] == "on_train_batch_end"]
    assert [call["step"] for call in steps] == list(range(1, STEPS + 1)) and steps[-1]["tokens"] == TOTAL
    assert sum(call["loss"] for call in steps) / STEPS == pytest.approx(
        sum(record["loss_nats_per_token"] * record["steps"] for record in records(config)) / STEPS
    )
    saved = [call["saved"] for call in seen if call["hook"] == "on_save_checkpoint"]
    assert saved == sorted(saved) and saved[-1] == newest(config).tokens
    scores = {call["tokens"]: call["score"] for call in seen if call["hook"] == "on_validation_end"}
    within = {line["tokens_total"] for line in lines(config) if "validation/mean_bits_per_byte" in line}
    assert within < scores.keys() and len(scores) == len(within) + len(PHASES)
    assert "loss_nats_per_token" in seen[-2]["metrics"] and seen[-1]["hook"] == "on_validation_end"


def test_a_callback_stops_training_with_its_state_saved(make_run: MakeRun, straight: RunConfig) -> None:
    config = make_run()
    (config.run.dir / "stop_after").write_text("6144")
    # A function that makes a callback is as good as its class; every rank calls its own.
    for ranks in (1, 2):
        assert run_ranks(train_with, ranks, config, (1,) if ranks == 1 else (2,), ["tests.watching.make_watcher"]) == (
            [[True]] if ranks == 1 else [[False]] * 2
        )
    assert newest(config).tokens == 6144
    (config.run.dir / "stop_after").unlink()
    assert run_ranks(sessions.train, 1, config, PHASES) == [[True, True]]


def test_a_callback_that_fails_is_named_and_what_was_saved_is_kept(make_run: MakeRun, straight: RunConfig) -> None:
    config = make_run("checkpoint.every_tokens=512")
    error = run_ranks(train_with, 1, config, PHASES, ["tests.watching.Failing"])[0]
    assert error.startswith("callbacks: tests.watching.Failing.on_train_batch_end raised RuntimeError: what the author")
    assert (config.run.dir / "heard").read_text() == error
    assert newest(config).tokens == 512
    assert run_ranks(sessions.train, 1, config, PHASES) == [[True] * 3]
    assert_equal_runs(config, straight)


def test_hooks_have_the_names_of_lightnings() -> None:
    missing, refusal = run_ranks(lightning_hooks, 1)[0]
    assert missing == []
    assert re.search(r"DeviceStatsMonitor has on_.*, setup, .*which the training loop does not call", refusal)


def test_a_callback_derived_from_lightnings_is_called(make_run: MakeRun) -> None:
    config = make_run()
    assert run_ranks(train_with, 1, config, (1,), ["tests.watching.make_lightning_callback"]) == [[True]]
    assert (config.run.dir / "steps").read_text() == "8"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("Watcher", "Watcher is no path to import; expected the import path of a class with some of the methods on_train_start, "),
        ("no_such_module.Watcher", "no_such_module.Watcher cannot be imported: No module named 'no_such_module'"),
        ("tests.watching.Wacher", "tests.watching.Wacher is not there: tests.watching has no Wacher; .* Did you mean 'Watcher'?"),
        ("tests.watching.NOT_CALLABLE", "tests.watching.NOT_CALLABLE is a int; "),
        ("tests.watching.Hookless", "tests.watching.Hookless has none of the methods that the training loop calls"),
        ("tests.watching.NeverCalled", "has on_train_epoch_end, which the training loop does not call"),
    ],
)  # fmt: skip
def test_what_is_no_callback_is_refused(path: str, problem: str) -> None:
    for refuse in (check_callbacks, load_callbacks):
        with pytest.raises(UserError, match=f"^callbacks: .*{problem}"):
            refuse([path])


def test_a_module_that_fails_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_broken_callbacks.py").write_text("class Watcher:\n    width = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^callbacks: my_broken_callbacks\.Watcher cannot be imported: division by zero"
    ):
        check_callbacks(["my_broken_callbacks.Watcher"])
