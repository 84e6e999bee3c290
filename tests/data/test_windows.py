"""The windows that a run reads: every token once in an epoch, in one order, whatever the lengths, phases, ranks and micro-batches."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus.indexed import IndexedTokens, IndexedWriter
from yxanul_nemo.data.blend import PERIOD, Blend, normalized_shares
from yxanul_nemo.data.source import ShuffledSource
from yxanul_nemo.data.windows import BatchLayout, PhaseBatches, PhaseWindows, Reading

CHUNK = 48


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[IndexedTokens]:
    """Three shards of 40 documents; the tokens count up, so that each one is unique and names its place."""
    folder, rng, token = tmp_path_factory.mktemp("shards"), np.random.default_rng(0), 0
    for name in ("a", "b", "c"):
        with IndexedWriter(folder / name, np.dtype(np.int32)) as writer:
            for length in rng.integers(1, 60, size=40):
                writer.add_documents([np.arange(token, token + length, dtype=np.int32)])
                token += int(length)
    return [IndexedTokens(folder / name) for name in ("a", "b", "c")]


def source(shards: list[IndexedTokens], seed: int = 1, chunk_tokens: int = CHUNK) -> ShuffledSource:
    return ShuffledSource(shards, (seed, "text"), chunk_tokens)


def one_source(
    opened: ShuffledSource, seq_len: int, windows: int, position: int = 0, shuffle_tokens: int = 500
) -> PhaseWindows:
    return PhaseWindows([opened], [position], seq_len, [Reading(0, windows, np.ones(1))], shuffle_tokens)


@given(
    seq_len=st.integers(1, CHUNK),
    chunk_tokens=st.integers(CHUNK, 200),
    shuffle_tokens=st.integers(0, 5000),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_token_once_but_for_what_is_shorter_than_a_window(
    shards: list[IndexedTokens], seq_len: int, chunk_tokens: int, shuffle_tokens: int, seed: int
) -> None:
    opened = source(shards, seed, chunk_tokens)
    windows = opened.windows_per_epoch(seq_len)
    inputs, labels = one_source(opened, seq_len, windows, shuffle_tokens=shuffle_tokens).read(0, windows)
    total = opened.tokens_per_epoch
    assert np.array_equal(labels, (inputs + 1) % total), "a window is a piece of the files, labels are the tokens after"
    assert np.array_equal(np.diff(inputs, axis=1) % total, np.ones((windows, seq_len - 1)))
    assert max(Counter(inputs.reshape(-1).tolist()).values()) == 1
    chunks = total // chunk_tokens
    assert total - inputs.size == chunks * (chunk_tokens % seq_len) + total % chunk_tokens % seq_len


@st.composite
def curricula(draw: st.DrawFn) -> list[tuple[int, int, float, int | None]]:
    """Phases as (seq_len, windows, share of the first source, window at which the plan changes)."""
    return [
        (
            draw(st.sampled_from([1, 2, 5, 8, 16, 24, 48])),
            (windows := draw(st.integers(1, 60))),
            draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])),
            draw(st.none() | st.integers(0, windows)),
        )
        for _ in range(draw(st.integers(1, 5)))
    ]


@given(phases=curricula(), shuffle_tokens=st.sampled_from([0, 50, 300, 100_000]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_no_token_is_read_twice_before_its_source_is_exhausted(
    shards: list[IndexedTokens], phases: list, shuffle_tokens: int, data: st.DataObject
) -> None:
    """Over curricula whose plans change in the middle of phases: longer, shorter, another blend."""
    sources = [ShuffledSource(shards[:2], (1, "x"), CHUNK), ShuffledSource(shards[2:], (1, "y"), CHUNK)]
    positions, fed = [0, 0], ([], [])
    for seq_len, windows, share, change_at in phases:
        readings = [Reading(0, windows, np.array([share, 1 - share]))]
        if change_at is not None:
            other = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
            windows = data.draw(st.integers(max(1, change_at), 2 * windows))
            readings.append(Reading(change_at, windows, np.array([other, 1 - other])))
        phase = PhaseWindows(sources, positions, seq_len, readings, shuffle_tokens)
        inputs, _ = phase.read(0, windows)
        source_of = phase.sources_of(0, windows)
        assert (phase.windows_before(windows) == np.bincount(source_of, minlength=2)).all()
        if change_at:
            before = PhaseWindows(sources, positions, seq_len, readings[:1], shuffle_tokens)
            assert np.array_equal(before.read(0, change_at)[0], inputs[:change_at]), "a change keeps the past"
        positions_after = phase.positions_after(windows)
        for i in range(2):
            mine, epoch = inputs[source_of == i], sources[i].tokens_per_epoch
            first_epoch = positions[i] // epoch
            if positions_after[i] <= (first_epoch + 1) * epoch:
                fed[i].append((first_epoch, mine.reshape(-1).tolist()))
        positions = positions_after
    for of_source in fed:
        for epoch in {e for e, _ in of_source}:
            tokens = [token for e, tokens in of_source if e == epoch for token in tokens]
            assert len(tokens) == len(set(tokens))


@given(
    seq_len=st.sampled_from([3, 8, 48]), position=st.integers(0, 9_000), shuffle_tokens=st.sampled_from([0, 400, 10**6])
)
@settings(max_examples=60, deadline=None)
def test_reading_over_the_end_of_an_epoch_exhausts_it_first(
    shards: list[IndexedTokens], seq_len: int, position: int, shuffle_tokens: int
) -> None:
    opened = source(shards)
    left, per_epoch = opened.windows_left(position, seq_len), opened.windows_per_epoch(seq_len)
    windows = left + per_epoch + 5
    inputs, _ = one_source(opened, seq_len, windows, position, shuffle_tokens).read(0, windows)
    for part in (inputs[:left], inputs[left : left + per_epoch], inputs[left + per_epoch :]):
        assert max(Counter(part.reshape(-1).tolist()).values(), default=1) == 1


def test_windows_come_from_all_over_a_stretch(shards: list[IndexedTokens]) -> None:
    """With stretches of the whole phase, a step's windows are spread as evenly as random ones; without, they are neighbours."""
    opened = source(shards)
    windows = opened.windows_per_epoch(8)
    steps = [
        one_source(opened, 8, windows, shuffle_tokens=tokens).read(0, windows // 10)[0][:, 0] // CHUNK
        for tokens in (10**6, 0)
    ]
    mixed, in_order = (len(set(step.tolist())) for step in steps)
    assert mixed > 2.5 * in_order


def test_seeds_names_and_epochs_give_other_orders(shards: list[IndexedTokens]) -> None:
    def order(opened: ShuffledSource, position: int = 0) -> list:
        return one_source(opened, 8, 60, position).read(0, 60)[0][:, 0].tolist()

    opened = source(shards)
    orders = [
        order(opened),
        order(source(shards, seed=2)),
        order(ShuffledSource(shards, (1, "other"), CHUNK)),
        order(opened, opened.tokens_per_epoch),
    ]
    assert len({tuple(found) for found in orders}) == len(orders)
    assert order(source(shards)) == orders[0]


@given(first=st.integers(0, 300), count=st.integers(1, 100), cut=st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_any_piece_equals_the_same_piece_of_a_long_read(
    shards: list[IndexedTokens], first: int, count: int, cut: int
) -> None:
    readings = [Reading(0, 300, np.array([0.7, 0.3])), Reading(cut, 400, np.array([0.2, 0.8]))]
    sources = [ShuffledSource(shards[:2], (1, "x"), CHUNK), ShuffledSource(shards[2:], (1, "y"), CHUNK)]
    whole = PhaseWindows(sources, [0, 7], 8, readings, 400).read(0, first + count)
    piece = PhaseWindows(sources, [0, 7], 8, readings, 400).read(first, count)
    assert np.array_equal(piece[0], whole[0][first:]) and np.array_equal(piece[1], whole[1][first:])


def test_the_order_stays_as_it_was(shards: list[IndexedTokens]) -> None:
    """The first windows as they were read when this order came into use: a run that is resumed goes on with it."""
    inputs, _ = one_source(source(shards), 8, 100, shuffle_tokens=400).read(0, 12)
    assert inputs[:, 0].tolist() == FIRST_TOKENS


FIRST_TOKENS = [3332, 3052, 3316, 2828, 2844, 3220, 2772, 3124, 3036, 468, 2820, 3132]


@given(weights=st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.01))
@settings(max_examples=30, deadline=None)
def test_blend_is_exact_over_a_period_and_close_everywhere(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    blend = Blend(shares)
    pattern = blend.sources(0, PERIOD)
    assert np.abs(np.bincount(pattern, minlength=len(shares)) - shares * PERIOD).max() <= 1
    counted = np.cumsum(pattern[:, None] == np.arange(len(shares)), axis=0)
    due = np.arange(1, PERIOD + 1)[:, None] * blend.counts / PERIOD
    assert np.abs(counted - due).max() < len(shares)


@given(first=st.integers(0, 3 * PERIOD), count=st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_blend_counts_are_those_of_its_sequence(first: int, count: int) -> None:
    blend = Blend(np.array([0.6, 0.3, 0.1]))
    taken = blend.windows_before(first + count) - blend.windows_before(first)
    assert list(taken) == list(np.bincount(blend.sources(first, count), minlength=3))


def test_shares_come_from_the_blend_or_from_sizes() -> None:
    assert list(normalized_shares(["a", "b"], {"b": 2, "a": 2}, {"a": 1, "b": 9})) == [0.5, 0.5]
    assert list(normalized_shares(["a", "b"], None, {"a": 1, "b": 3})) == [0.25, 0.75]
    assert list(normalized_shares(["a", "b"], {"b": 1}, {"a": 1, "b": 3})) == [0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_ranks_and_micro_batches_do_not_change_the_order(
    shards: list[IndexedTokens], ranks: int, micro_batch_size: int
) -> None:
    readings = [Reading(0, 256, np.array([0.75, 0.25]))]
    windows = PhaseWindows([source(shards, 1), source(shards, 2)], [0, 100], 4, readings, 600)
    layout = BatchLayout(micro_batch_size, 64 // ranks // micro_batch_size, ranks)
    for step in (0, 3):
        per_rank = [PhaseBatches(windows, layout, rank, 0, 4).batch(step)[0] for rank in range(ranks)]
        together = np.stack([ids.numpy() for ids in per_rank], axis=1).reshape(-1, 4)
        assert np.array_equal(together, windows.read(step * 64, 64)[0])


def test_steps_come_one_after_another_from_any_step_on(shards: list[IndexedTokens]) -> None:
    windows = one_source(source(shards), 4, 17 * 6)
    batches = PhaseBatches(windows, BatchLayout(2, 3, 1), 0, 5, 17)
    steps = list(batches)
    assert len(steps) == len(batches) == 12
    for step, (ids_ABT, labels_ABT) in enumerate(steps, start=5):
        inputs, labels = windows.read(step * 6, 6)
        assert np.array_equal(ids_ABT.numpy().reshape(6, 4), inputs)
        assert np.array_equal(labels_ABT.numpy().reshape(6, 4), labels)


def test_documents_of_a_window_are_those_in_the_files(shards: list[IndexedTokens]) -> None:
    opened = source(shards)
    places = opened.places(opened.window_positions(0, 16, np.arange(opened.windows_per_epoch(16))))
    for place, tokens in zip(places.tolist(), opened.read(places, 16), strict=True):
        pieces = opened.documents(place, 16)
        found = [shards[p.shard].document(p.document)[p.first_token :][: p.tokens] for p in pieces]
        assert np.concatenate(found).tolist() == tokens.tolist()


@pytest.mark.gpu
def test_steps_for_a_gpu_are_the_same_ones_in_pinned_memory(shards: list[IndexedTokens]) -> None:
    windows, layout = one_source(source(shards), 4, 54), BatchLayout(2, 3, 1)
    gpu = torch.device("cuda", torch.cuda.current_device())
    plain, pinned = (PhaseBatches(windows, layout, 0, 0, 9, pinned=pinned) for pinned in (False, True))
    for (ids_ABT, labels_ABT), for_gpu in zip(plain, pinned, strict=True):
        assert all(x.is_pinned() for x in for_gpu)
        copied = [x.to(gpu, non_blocking=True) for x in for_gpu]
        assert torch.equal(copied[0].cpu(), ids_ABT) and torch.equal(copied[1].cpu(), labels_ABT)


def write_shard(path: Path, documents: list[np.ndarray]) -> IndexedTokens:
    with IndexedWriter(path, np.dtype(np.int32)) as writer:
        writer.add_documents(documents)
    return IndexedTokens(path)


def test_a_source_shorter_than_a_chunk_is_one_chunk(tmp_path: Path) -> None:
    small = source([write_shard(tmp_path / "s", [np.arange(20, dtype=np.int32)])], chunk_tokens=6144)
    inputs, labels = one_source(small, 10, 4, shuffle_tokens=1000).read(0, 4)
    assert sorted(inputs[:2].reshape(-1).tolist()) == sorted(inputs[2:].reshape(-1).tolist()) == list(range(20))
    assert np.array_equal(labels, (inputs + 1) % 20)
