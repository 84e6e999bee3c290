"""Whole phases in processes of their own: nothing lost or repeated by stops and changes of layout."""

import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus.manifest import load_manifest
from data_prep.prepare import run_data_stage
from tests.ranks import run_ranks
from tests.training import sessions
from tests.training.runs import (
    PHASES,
    STEPS,
    TOTAL,
    WEIGHTS,
    MakeRun,
    assert_equal_runs,
    assert_matches,
    assert_records_cover_each_step,
    ledger,
    newest,
    records,
    state,
)
from yxanul_nemo.checkpoint.ledger import ChangeRecord
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, total_tokens
from yxanul_nemo.curriculum.schedule import learning_rate
from yxanul_nemo.data.blend import Blend, normalized_shares
from yxanul_nemo.validation.record import phase_result_path


def changed(config: RunConfig, make_config: MakeRun, *overrides: str) -> RunConfig:
    """The same run, configured otherwise."""
    return make_config(f"run.dir={config.run.dir}", "logging.every_steps=3", *overrides)


def test_training_goes_on_while_a_save_is_written_and_does_not_change_it(
    make_run: MakeRun, straight: RunConfig
) -> None:
    """The save at 2048 tokens is written when three more steps are done; a save that training waits for is the same."""
    ahead, blocking = (
        make_run("checkpoint.keep_latest=9"),
        make_run("checkpoint.keep_latest=9", "checkpoint.asynchronous=false"),
    )
    assert run_ranks(sessions.train_ahead_of_a_save, 1, ahead, PHASES, 2048, 3) == [3]
    run_ranks(sessions.train, 1, blocking, PHASES)
    for config in (ahead, blocking):
        assert_equal_runs(config, straight)
    saved = [CheckpointStore(config.run.dir / "checkpoints").list() for config in (ahead, blocking)]
    assert [c.tokens for c in saved[0]] == [c.tokens for c in saved[1]] and saved[0][0].tokens == 2048
    for one, other in zip(*saved, strict=True):
        assert one.manifest.files[WEIGHTS] == other.manifest.files[WEIGHTS], one.tokens
        assert one.manifest.files["ledger.json"] == other.manifest.files["ledger.json"], one.tokens
    # The last save of a phase ends after its last record.
    assert any(record["save_seconds"] > 0 for record in records(ahead))
    assert any(record["save_wait_seconds"] > 0 for record in records(ahead))


def test_what_draws_random_numbers_in_a_step_goes_on_where_it_stood(make_run: MakeRun) -> None:
    """As dropout would; the draws are also those of the step's number on a second rank, which has states of its own."""
    for ranks in (1, 2):
        through, stopped = make_run(), make_run()
        expected = run_ranks(sessions.train_and_draw, ranks, through, PHASES)
        drawn = [[] for _ in range(ranks)]
        for tokens in (2560, 7168, 0):
            for all_drawn, more in zip(
                drawn, run_ranks(sessions.train_and_draw, ranks, stopped, PHASES, tokens), strict=True
            ):
                all_drawn += more
        assert drawn == expected
        assert len(expected[0]) == len(set(expected[0])) == STEPS


def test_stops_by_signals_are_saved_and_change_nothing(make_run: MakeRun, straight: RunConfig) -> None:
    """After the first step, at the end of a phase, after the first of the next, before its last, and at a save."""
    config = make_run()
    stops = [(512, "SIGTERM"), (4096, "SIGUSR1"), (5120, "SIGINT"), (9216, "SIGTERM"), (14336, "SIGUSR1")]
    for tokens, name in stops:
        completed = run_ranks(sessions.train_until, 1, config, PHASES, tokens, signal.Signals[name])[0]
        assert completed[-1] is False
        assert newest(config).tokens == tokens
        assert newest(config).phase_end == (tokens == 4096)
    assert run_ranks(sessions.train, 1, config, PHASES) == [[True]]
    assert_equal_runs(config, straight)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(make_run: MakeRun) -> None:
    config = make_run()
    for tokens, rank in ((2560, 1), (7168, 0)):
        completed = run_ranks(sessions.train_until, 2, config, PHASES, tokens, signal.SIGTERM, rank)
        assert completed[0] == completed[1] and completed[0][-1] is False
        assert newest(config).tokens == tokens
    assert run_ranks(sessions.train, 2, config, PHASES) == [[True, True]] * 2
    assert_records_cover_each_step(config)


def test_a_signal_in_validation_ends_it_and_only_validation_is_repeated(make_run: MakeRun, straight: RunConfig) -> None:
    config = make_run()
    assert run_ranks(sessions.train_and_signal_in_validation, 1, config, [1]) == [[False]]
    assert newest(config).phase_end and not phase_result_path(config.run.dir, 1).exists()
    before = newest(config)
    assert run_ranks(sessions.train, 1, config, [1]) == [[True]]
    assert newest(config) == before
    results = [json.loads(phase_result_path(run.run.dir, 1).read_text()) for run in (config, straight)]
    assert results[0]["domains"] == results[1]["domains"]


def test_a_phase_whose_validation_was_lost_is_validated_later(make_run: MakeRun, straight: RunConfig) -> None:
    config = make_run()
    run_ranks(sessions.train_until, 1, config, PHASES, 7168, signal.SIGTERM)
    result = phase_result_path(config.run.dir, 1)
    expected = json.loads(result.read_text())
    result.unlink()
    assert run_ranks(sessions.train, 1, config, PHASES) == [[True] * 3]
    assert json.loads(result.read_text()) == expected
    assert_equal_runs(config, straight)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_run_is_fed_the_corpus_once_per_epoch(make_run: MakeRun, ranks: int) -> None:
    """Against the .bin files themselves: every window is a piece of them, and all tokens come before one comes again."""
    overrides = [
        f"curriculum.phases.{i}.{key}={value}"
        for i, tokens in enumerate((40960, 57344, 57344))
        for key, value in (("tokens", tokens), ("tokens_per_step", 8192))
    ]
    config = make_run("parallel.micro_batch_tokens=1024", *overrides)
    fed = run_ranks(sessions.train_and_read_back, ranks, config, PHASES)
    manifest = load_manifest(config.data_dir)
    names = config.data.source_names
    shares = normalized_shares(names, None, {name: manifest.sources[name].tokens("train") for name in names})
    ids_of: dict[int, list[np.ndarray]] = {source: [] for source in range(len(names))}
    labels_of: dict[int, list[np.ndarray]] = {source: [] for source in range(len(names))}
    for phase in range(len(PHASES)):
        # [ranks, steps, accumulation, micro-batch, tokens] in the order of the windows: steps, accumulation, ranks, micro-batch.
        ids, labels = (
            np.stack([[batch[i] for batch in of_rank[phase]] for of_rank in fed]).transpose(1, 2, 0, 3, 4)
            for i in range(2)
        )
        ids, labels = ids.reshape(-1, ids.shape[-1]), labels.reshape(-1, labels.shape[-1])
        for source, of_window, next_of_window in zip(Blend(shares).sources(0, len(ids)), ids, labels, strict=True):
            ids_of[source].append(of_window)
            labels_of[source].append(next_of_window)
    for source, name in enumerate(names):
        corpus = np.concatenate(
            [
                np.fromfile(f"{prefix}.bin", dtype=manifest.dtype)
                for prefix in manifest.prefixes(config.data_dir, name, "train")
            ]
        )
        # The last window of the files may be continued by their first.
        everything = np.concatenate([corpus, corpus[:256]]).tobytes()
        for ids, labels in zip(ids_of[source], labels_of[source], strict=True):
            assert np.array_equal(labels[:-1], ids[1:])
            assert np.append(ids, labels[-1]).astype(manifest.dtype).tobytes() in everything
        fed_tokens = np.concatenate(ids_of[source])
        assert len(fed_tokens) > len(corpus), "the run reads more than an epoch"
        # Each phase may leave less than a window at the end of a chunk, and the epoch at its own.
        slack = 256 * (len(PHASES) + 1)
        first_epoch = Counter(fed_tokens[: len(corpus) - slack].tolist())
        assert first_epoch <= Counter(corpus.tolist()), "a token came twice before all had come once"
        assert (Counter(corpus.tolist()) - Counter(fed_tokens[: len(corpus) + slack].tolist())).total() <= slack


def test_ranks_and_micro_batch_may_change_in_the_middle(make_run: MakeRun, make_config: MakeRun) -> None:
    """The same tokens in the same order: losses differ by the rounding of other sums."""
    plain = make_run("logging.every_steps=1")
    run_ranks(sessions.train, 1, plain, PHASES)
    config = make_run("logging.every_steps=1")
    run_ranks(sessions.train_until, 1, config, PHASES, 2560, signal.SIGTERM)
    small = changed(config, make_config, "logging.every_steps=1", "parallel.micro_batch_tokens=128")
    run_ranks(sessions.train_until, 2, small, PHASES, 7168, signal.SIGTERM)
    run_ranks(sessions.train, 1, small, PHASES)
    expected = {record["tokens_total"]: record for record in records(plain)}
    seen = {record["tokens_total"]: record for record in records(config)}
    assert len(seen) == STEPS and seen.keys() == expected.keys()
    for tokens, record in seen.items():
        assert record["loss_nats_per_token"] == pytest.approx(expected[tokens]["loss_nats_per_token"], rel=1e-6)
    assert ledger(config).tokens_per_source == ledger(plain).tokens_per_source
    assert "world_size 1 -> 2" in ledger(config).notes[0] and "micro_batch_size 32 -> 8" in ledger(config).notes[0]


@pytest.fixture(scope="module")
def in_phase_2(make_run: MakeRun) -> RunConfig:
    """A run that was stopped in the middle of phase 2."""
    config = make_run()
    run_ranks(sessions.train_until, 1, config, PHASES, 7168, signal.SIGTERM)
    return config


def test_another_run_is_refused_by_name(in_phase_2: RunConfig, make_config: MakeRun) -> None:
    cases = {
        (
            "curriculum.phases.0.lr_scale=0.9",
        ): r"curriculum\.phases\.0\.lr_scale: 0\.7 there, 0\.9 here.*phase 1 is finished",
        (
            "curriculum.phases.0.lr_scale=0.9",
            "allow=[curriculum]",
        ): r"curriculum\.phases\.0\.lr_scale \(phase 1 is finished",
        ("model.ffn_hidden_size=32",): r"model\.ffn_hidden_size: 64 there, 32 here.*shapes of weights",
        ("optim.lr=1e-3",): r"optim\.lr: 0\.01 there, 0\.001 here.*allow=\[optim\.lr\]",
        ("optim=adamw",): r"optim: muon there, adamw here.*other moments",
        ("optim=adamw", "allow=[optim]"): r"optim: muon there, adamw here.*cannot change",
        ("data.seed=1",): r"data\.seed: 1234 there, 1 here",
        ("allow=[optimm]",): r"allow: names no key: 'optimm'.*'optim'",
    }
    before = state(in_phase_2)
    configs = [changed(in_phase_2, make_config, *overrides) for overrides in cases]
    errors = run_ranks(sessions.refusals, 1, configs, PHASES)[0]
    for error, expected in zip(errors, cases.values(), strict=True):
        assert_matches(error, expected)
    assert state(in_phase_2) == before


def test_another_corpus_and_tokenizer_are_refused(in_phase_2: RunConfig, make_config: MakeRun, tmp_path: Path) -> None:
    other = make_config(f"run.dir={tmp_path}", "tokenizer.vocab_size=650")
    run_data_stage(other)
    shutil.copytree(in_phase_2.run.dir / "checkpoints", tmp_path / "checkpoints")
    error = run_ranks(sessions.refusals, 1, [other], PHASES)[0][0]
    for name in ("tokenizer", r"data\.sources"):
        assert_matches(error, rf"{name}: \S.* there, \S.* here")


def test_a_named_change_is_taken_and_noted(in_phase_2: RunConfig, make_config: MakeRun, tmp_path: Path) -> None:
    for part in ("data", "tokenizer", "checkpoints", "validation"):
        shutil.copytree(in_phase_2.run.dir / part, tmp_path / part)
    config = make_config(f"run.dir={tmp_path}", "optim.lr=1e-3", "allow=[optim.lr]")
    run_ranks(sessions.train, 1, config, PHASES)
    kept = ledger(config)
    assert kept.changes == (ChangeRecord(key="optim.lr", before=0.01, now=0.001, at_tokens=7168),) and not kept.notes
    total = total_tokens(plan_phases(config.curriculum))
    assert records(config)[-1]["learning_rate"] == learning_rate(config.optim, TOTAL, total, 1.0)
    # Without the escape it goes on too: the ledger is of the changed run now.
    assert run_ranks(sessions.refusals, 1, [config.model_copy(update={"allow": []})], PHASES) == [[""]]


def test_a_phase_out_of_turn_is_refused(make_run: MakeRun) -> None:
    config = make_run()
    assert_matches(run_ranks(sessions.refusals, 1, [config], [2])[0][0], "phases=2: the run stands in phase 0")


def test_records_say_what_was_applied(straight: RunConfig) -> None:
    phases = {phase.number: phase for phase in plan_phases(straight.curriculum)}
    total = total_tokens(list(phases.values()))
    for record in records(straight):
        phase = phases[record["phase"]]
        assert record["learning_rate"] == learning_rate(straight.optim, record["tokens_total"], total, phase.lr_scale)
        assert record["tokens_total"] == phase.first_token + record["step_in_phase"] * phase.tokens_per_step
        assert (record["seq_len"], record["grad_clip"]) == (phase.seq_len, phase.grad_clip)
        assert record["grad_norm"] > 0 and record["tokens_per_second"] > 0 and record["skipped_steps"] == 0
    assert_records_cover_each_step(straight)
