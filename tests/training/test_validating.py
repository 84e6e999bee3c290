"""Validation inside phases: where it is due, once, without a trace in training; early stops; and blends that follow results."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training import sessions
from tests.training.runs import lines
from tests.training.test_session import newest, state
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.adapt import adapted_blend
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.data.blend import Blend, normalized_shares
from yxanul_nemo.validation.record import early_stop_tokens, in_phase_results, phase_result_path

PHASES = (1, 2)
WITHIN = ("validation.every_tokens=1500", "validation.every_documents=4")
DUE = [1536, 3072, 5120, 6144, 8192, 9216]
"""Steps of 512 tokens up to 4096, then of 1024 up to 10240, where the phase ends: the first at or after each multiple of 1500."""

MakeRun = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make_run(prepared: Path, make_config: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    def make(*overrides: str) -> RunConfig:
        folder = tmp_path_factory.mktemp("run")
        for part in ("data", "tokenizer"):
            (folder / part).symlink_to(prepared / part)
        return make_config(f"run.dir={folder}", "logging.every_steps=3", *overrides)

    return make


@pytest.fixture(scope="module")
def straight(make_run: MakeRun) -> RunConfig:
    """Two phases with validation inside them, undisturbed."""
    config = make_run(*WITHIN)
    run_ranks(sessions.train, 1, config, PHASES)
    return config


def results(config: RunConfig) -> dict[int, dict]:
    return {tokens: json.loads(path.read_text()) for tokens, path in in_phase_results(config.run.dir)}


def validations(config: RunConfig) -> dict[int, float]:
    """Tokens and mean bits per byte of the validations in metrics.jsonl."""
    found = [r for r in lines(config) if "validation/mean_bits_per_byte" in r]
    by_tokens = {record["tokens_total"]: record["validation/mean_bits_per_byte"] for record in found}
    assert len(by_tokens) == len(found), "each stands there once"
    return by_tokens


def test_it_happens_where_due_and_leaves_no_trace(straight: RunConfig, make_run: MakeRun) -> None:
    found = results(straight)
    assert list(found) == DUE
    assert {tokens: result["mean_bits_per_byte"] for tokens, result in found.items()} == validations(straight)
    for tokens, result in found.items():
        assert result["phase"] == (1 if tokens < 4096 else 2) and result["eval_len_tokens"] == 64
        assert {score["documents"] for score in result["domains"].values()} <= {1, 2, 3, 4}
    assert found[1536]["at_phase_len"]["eval_len_tokens"] == 16 and "at_phase_len" not in found[5120], "64 is both"
    plain = make_run()
    run_ranks(sessions.train, 1, plain, PHASES)
    assert state(plain) == state(straight)
    assert not validations(plain)
    whole, part = (json.loads(phase_result_path(straight.run.dir, 2).read_text()), found[9216])
    assert whole["domains"]["prose"]["documents"] > part["domains"]["prose"]["documents"]


def test_two_ranks_find_the_same(straight: RunConfig, make_run: MakeRun) -> None:
    config = make_run(*WITHIN)
    run_ranks(sessions.train, 2, config, [1])
    for tokens, value in validations(config).items():
        assert value == pytest.approx(validations(straight)[tokens], rel=1e-5)
    assert list(results(config)) == DUE[:2]


def test_stops_and_kills_change_nothing(straight: RunConfig, make_run: MakeRun, tmp_path: Path) -> None:
    """A stop at a step that is due, a kill between the result and the checkpoint, and one later than the checkpoint."""
    config = make_run(*WITHIN, "checkpoint.every_tokens=1500")
    assert run_ranks(sessions.train_until, 1, config, PHASES, 3072, signal.SIGTERM) == [[False]]
    assert list(results(config)) == DUE[:1], "not while a stop is asked for"
    with pytest.raises(AssertionError, match="ended with exit code"):
        run_ranks(sessions.train_and_die, 1, config, PHASES, "save", 6144, 5, tmp_path / "note")
    assert 6144 in results(config) and newest(config).tokens < 6144
    with pytest.raises(AssertionError, match="ended with exit code"):
        run_ranks(sessions.train_and_die, 1, config, PHASES, "step", 9216, 5, tmp_path / "note")
    run_ranks(sessions.train, 1, config, PHASES)
    assert state(config) == state(straight)
    assert results(config) == results(straight)
    assert validations(config) == validations(straight)


def test_training_that_does_not_improve_ends_early_with_its_state_saved(make_run: MakeRun) -> None:
    config = make_run(*WITHIN, "validation.early_stop_patience=2", "validation.early_stop_min_improvement=50")
    assert run_ranks(sessions.train, 1, config, PHASES) == [[True, False]]
    assert early_stop_tokens(config) == newest(config).tokens == 5120
    assert list(results(config)) == DUE[:3]


@pytest.fixture(scope="module")
def adapted(make_run: MakeRun) -> RunConfig:
    """Two phases, of which the second has a blend that follows from the validation of the first."""
    config = make_run("curriculum.adapt_blend=true", "curriculum.adapt_blend_bounds=[0.5,2]")
    run_ranks(sessions.train, 1, config, PHASES)
    return config


def test_the_next_phases_blend_follows_the_recorded_ratios(adapted: RunConfig) -> None:
    result = json.loads(phase_result_path(adapted.run.dir, 1).read_text())
    from data_prep.corpus.manifest import load_manifest

    manifest = load_manifest(adapted.data_dir)
    names = adapted.data.source_names
    sizes = {name: manifest.sources[name].tokens("train") for name in names}
    expected = adapted_blend(adapted, None, sizes, result["surprise_ratio_bits_per_byte"])
    ledger = newest(adapted).read_ledger()
    assert [record.adapted_blend for record in ledger.phases] == [None, expected]
    assert [record.blend for record in ledger.phases] == [None, None], "what was configured stands beside it"
    assert "phase 2 at 4096 tokens: blend adapted to prose 0." in ledger.notes[0]
    shares = normalized_shares(names, expected, sizes)
    assert max(abs(shares - normalized_shares(names, None, sizes))) > 0.01, "it moved"
    phase = plan_phases(adapted.curriculum)[1]
    windows = Blend(shares).windows_before(phase.tokens // phase.seq_len)
    assert ledger.phases[1].tokens_per_source == {
        name: int(n) * phase.seq_len for name, n in zip(names, windows, strict=True) if n
    }


def test_a_resumed_phase_keeps_its_blend(adapted: RunConfig, make_run: MakeRun) -> None:
    """What the phase began with stands in the ledger: neither the result nor the setting is asked again."""
    config = make_run("curriculum.adapt_blend=true", "curriculum.adapt_blend_bounds=[0.5,2]")
    run_ranks(sessions.train_until, 1, config, PHASES, 7168, signal.SIGTERM)
    path = phase_result_path(config.run.dir, 1)
    changed = json.loads(path.read_text())
    changed["surprise_ratio_bits_per_byte"] = dict.fromkeys(changed["surprise_ratio_bits_per_byte"], 1.0)
    path.write_text(json.dumps(changed))
    curriculum = config.curriculum.model_copy(update={"adapt_blend": False})
    other = config.model_copy(update={"curriculum": curriculum, "allow": ["curriculum.adapt_blend"]})
    run_ranks(sessions.train, 1, other, [2])
    assert newest(config).read_ledger().phases[1].adapted_blend == newest(adapted).read_ledger().phases[1].adapted_blend
    run_ranks(sessions.train, 1, config.model_copy(update={"allow": ["curriculum.adapt_blend"]}), PHASES)
    assert state(config)[0] == state(adapted)[0]


def test_without_the_result_the_phase_does_not_begin(adapted: RunConfig, make_run: MakeRun) -> None:
    config = make_run("curriculum.adapt_blend=true", "curriculum.adapt_blend_bounds=[0.5,2]")
    run_ranks(sessions.train, 1, config, [1])
    shutil.rmtree(config.run.dir / "validation")
    error = run_ranks(sessions.refusals, 1, [config], [2])[0][0]
    assert "phase-01.json: does not exist" in error and "stage=train phases=1" in error
    run_ranks(sessions.train, 1, config, PHASES)
    assert state(config) == state(adapted)
