"""Whole phases under faults: kills at any line and at any moment, damage, a full disk, bad gradients, hangs."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import load_manifest
from tests.ranks import CONTEXT, run_ranks
from tests.training import sessions
from tests.training.runs import (
    PHASES,
    STEPS,
    TOTAL,
    WEIGHTS,
    MakeRun,
    assert_equal_runs,
    assert_matches,
    ledger,
    lines,
    newest,
    records,
    skipped,
    state,
)
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.data.windows import PhaseWindows, Reading, open_sources


@pytest.mark.parametrize(
    ("work", "kills", "seed"), [("save", 5, 1), ("step", 3, 2), ("validation", 3, 3), ("snapshot", 3, 4)]
)
def test_kills_at_random_lines_change_nothing(
    make_run: MakeRun, counted: tuple[RunConfig, dict], tmp_path: Path, work: str, kills: int, seed: int
) -> None:
    straight, lines = counted[0], counted[1][work]
    config, draw = make_run(), random.Random(seed)
    for number, tokens in enumerate(sorted(draw.sample(sorted(lines), kills))):
        note = tmp_path / f"{number}"
        with pytest.raises(AssertionError, match="ended with exit code"):
            # Lines vary a little with what an earlier kill has left.
            line = draw.randrange(1, lines[tokens] * 9 // 10)
            run_ranks(sessions.train_and_die, 1, config, PHASES, work, tokens, line, note)
        assert note.is_file(), "it ended for another reason"
    run_ranks(sessions.train, 1, config, PHASES)
    assert_equal_runs(config, straight)


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_change_nothing(make_run: MakeRun, straight: RunConfig) -> None:
    """A checkpoint after each step, and a kill within the first 0.7 s of each process, whatever it does then; on a slow machine some more.

    What was committed stays, everything that is listed is whole, and runs that come to their end all the same are equal to the
    undisturbed one.
    """
    draw, kills, in_saves = random.Random(7), 0, 0
    config, committed = make_run("checkpoint.every_tokens=1"), 0
    while kills < 100 or (in_saves <= 5 and kills < 300):
        store = CheckpointStore(config.run.dir / "checkpoints")
        began = CONTEXT.Event()
        process = CONTEXT.Process(target=sessions.train_alone, args=(config, PHASES, began))
        process.start()
        assert began.wait(60)
        process.join(draw.uniform(0, 0.7))
        process.kill()
        process.join()
        in_saves += any(store.root.glob(".tmp-*"))
        good = store.newest_good()
        assert (good.tokens if good else 0) >= committed, "a committed checkpoint is gone"
        committed = good.tokens if good else 0
        for checkpoint in store.list():
            store.check(checkpoint)
            assert checkpoint.read_ledger().tokens_total == checkpoint.tokens
        if process.exitcode == 0:
            assert_equal_runs(config, straight)
            config, committed = make_run("checkpoint.every_tokens=1"), 0
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    assert in_saves > 5, "no kill fell into a save; the test proves nothing"
    run_ranks(sessions.train, 1, config, PHASES)
    assert_equal_runs(config, straight)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(make_run: MakeRun, straight: RunConfig) -> None:
    """One bit flipped at the end of a phase, and one in the middle of another."""
    config = make_run()
    for tokens in (4096, 14336):
        run_ranks(sessions.train_until, 1, config, PHASES, tokens, signal.SIGTERM)
        assert newest(config).tokens == tokens
        path = newest(config).path / WEIGHTS
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    run_ranks(sessions.train, 1, config, PHASES)
    assert_equal_runs(config, straight)
    assert len(list((config.run.dir / "checkpoints").glob("*.bad-1"))) == 2


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_a_full_disk_is_told_by_all_ranks_and_leaves_nothing_half_written(
    make_run: MakeRun, straight: RunConfig, ranks: int, rank: int
) -> None:
    """No file may grow over 8 bytes in the second save; afterwards there is room again."""
    # Without records in between, which could not be written either.
    config = make_run("logging.every_steps=100", f"parallel.tensor_parallel={ranks}")
    errors = run_ranks(sessions.train_on_a_full_disk, ranks, config, PHASES, 4096, rank)
    for error in errors:
        assert_matches(error, "checkpoints: saving a checkpoint failed.*File too large")
    assert newest(config).tokens == 2048
    assert not list((config.run.dir / "checkpoints").glob(".tmp*"))
    run_ranks(sessions.train, ranks, config, PHASES)
    assert newest(config).tokens == TOTAL
    if ranks == 1:
        assert_equal_runs(config, straight)


def test_gradients_that_are_not_finite_are_skipped_and_counted(make_run: MakeRun) -> None:
    config = make_run("logging.every_steps=1")
    assert run_ranks(sessions.train_with_bad_gradients, 1, config, PHASES, [2, 3, 10]) == [""]
    assert ledger(config).skipped_steps == 3 and ledger(config).steps_total == STEPS
    assert [i for i, record in enumerate(records(config)) if record["skipped_steps"]] == [2, 3, 10]
    assert [r["loss_nats_per_token"] is None for r in records(config)[:4]] == [False, False, True, True]
    assert skipped(config) == [(1, 3, 1536), (1, 4, 2048), (2, 3, 7168)]
    totals = [line["tokens_total"] for line in lines(config)]
    assert totals == sorted(totals)
    from safetensors.numpy import load_file

    tensors = load_file(newest(config).path / WEIGHTS)
    assert tensors["optimizer.step@0"] == STEPS - 3
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_twenty_bad_gradients_in_a_row_end_the_run(make_run: MakeRun) -> None:
    config = make_run("curriculum.phases.0.tokens=16384", "logging.every_steps=2")
    error = run_ranks(sessions.train_with_bad_gradients, 1, config, [1], range(6, 32))[0]
    assert_matches(
        error, r"phase 1: 20 updates in a row were skipped \(steps 7-26 of the phase\), because loss or gradient"
    )
    assert ledger(config).tokens_total < 26 * 512
    path = config.run.dir / "skipped_updates" / "phase-01-steps-7-26.json"
    assert str(path) in error
    assert skipped(config) == [(1, step, 512 * step) for step in range(7, 27)]
    assert_report_is_what_was_trained_on(config, json.loads(path.read_text()), range(7, 27))


def assert_report_is_what_was_trained_on(config: RunConfig, report: dict, steps: range) -> None:
    """Against the run's own windows: the documents that the report names, read from their files, give the same tokens."""
    phase = plan_phases(config.curriculum)[0]
    manifest = load_manifest(config.data_dir)
    names = config.data.source_names
    shards = {name: [IndexedTokens(p) for p in manifest.prefixes(config.data_dir, name, "train")] for name in names}
    shares = normalized_shares(names, phase.blend, {name: manifest.sources[name].tokens("train") for name in names})
    sources = open_sources(shards, config.data.seed, config.data.chunk_tokens)
    reading = Reading(0, phase.tokens // phase.seq_len, shares)
    windows = PhaseWindows(sources, [0] * len(names), phase.seq_len, [reading], config.data.shuffle_tokens)
    assert [step["step_in_phase"] for step in report["steps"]] == list(steps)
    for step in report["steps"]:
        first, last = step["windows"]
        assert (first, last + 1) == tuple(
            (step["step_in_phase"] - 1 + i) * phase.tokens_per_step // phase.seq_len for i in range(2)
        )
        ids, _ = windows.read(first, last - first + 1)
        source_of = windows.sources_of(first, last - first + 1)
        for source, name in enumerate(names):
            pieces = [
                IndexedTokens(piece["shard"]).document(piece["document"])[piece["first_token"] :][: piece["tokens"]]
                for piece in step["sources"][name]["documents"]
            ]
            assert np.concatenate(pieces).tolist() == ids[source_of == source].reshape(-1).tolist()


def test_spikes_are_skipped_on_the_device_and_a_resumed_run_skips_the_same(make_run: MakeRun) -> None:
    """Gradients 10,000 times as large in three steps of 64; the third one comes right after a stop."""
    overrides = (
        "guards.spike_sigma=6",
        "guards.spike_window_steps=16",
        "curriculum.phases.0.tokens=32768",
        "logging.every_steps=5",
    )
    straight, stopped, unguarded = make_run(*overrides), make_run(*overrides), make_run(*overrides[2:])
    spikes = [3, 20, 44]
    for config in (straight, unguarded):
        run_ranks(sessions.train_with_spikes, 1, config, [1], spikes)
    # Step 4 is a spike too, but so early that there is nothing to compare it with.
    assert skipped(straight) == [(1, 21, 21 * 512), (1, 45, 45 * 512)] and skipped(unguarded) == []
    run_ranks(sessions.train_with_spikes, 1, stopped, [1], spikes, 44)
    assert newest(stopped).tokens == 44 * 512
    run_ranks(sessions.train_with_spikes, 1, stopped, [1], [0])
    assert skipped(stopped) == skipped(straight) and ledger(stopped).skipped_steps == 2
    assert state(stopped) == state(straight) and state(straight)[0] != state(unguarded)[0]
    # The guard may be turned on in the middle of a run, if that is named.
    assert_matches(
        run_ranks(sessions.refusals, 1, [guarded := unguarded.model_copy(update={"guards": straight.guards})], [1, 2])[
            0
        ][0],
        r"guards\.spike_sigma: unset there",
    )
    assert run_ranks(sessions.refusals, 1, [guarded.model_copy(update={"allow": ["guards"]})], [1, 2]) == [[""]]


def test_a_hanging_rank_is_ended_with_the_stacks_of_all(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run("guards.hang_minutes=0.05")
    # Whichever rank is first, the other one may see its connection break.
    with pytest.raises(AssertionError, match=r"ended with exit code|Connection closed by peer"):
        run_ranks(sessions.train_and_hang, 2, config, PHASES, 2560, 1, tmp_path)
    shown = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    for text in shown:
        assert_matches(
            text, r"rank \d: no step for 0\.\d minutes \(guards\.hang_minutes\).*Current thread.*in train_and_hang"
        )
    assert "in reduce_scatter_tensor" in shown[0] and "in reduce_scatter_tensor" not in shown[1], shown
    assert newest(config).tokens == 2048
    run_ranks(sessions.train, 2, config, PHASES)
    assert newest(config).tokens == TOTAL
