"""The token stream of a run: every token once, in one order, whatever the lengths, ranks and micro-batches."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus.indexed import IndexedTokens, IndexedWriter
from yxanul_nemo.data.blend import PERIOD, Blend, normalized_shares
from yxanul_nemo.data.stream import TokenStream
from yxanul_nemo.data.windows import BatchLayout, PhaseBatches, PhaseWindows


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[IndexedTokens]:
    """Two shards of 40 documents; the tokens count up, so that each one is unique."""
    folder, rng, token = tmp_path_factory.mktemp("shards"), np.random.default_rng(0), 0
    for name in ("a", "b"):
        with IndexedWriter(folder / name, np.dtype(np.int32)) as writer:
            for length in rng.integers(1, 60, size=40):
                writer.add_documents([np.arange(token, token + length, dtype=np.int32)])
                token += int(length)
    return [IndexedTokens(folder / name) for name in ("a", "b")]


def test_an_epoch_is_every_document_whole_and_once(shards: list[IndexedTokens]) -> None:
    stream = TokenStream(shards, seed=7)
    epoch = stream.read(0, stream.tokens_per_epoch)
    assert sorted(epoch) == list(range(stream.tokens_per_epoch))
    starts = {int(shard.document(i)[0]): len(shard.document(i)) for shard in shards for i in range(len(shard))}
    place = 0
    while place < len(epoch):
        length = starts[int(epoch[place])]
        assert list(epoch[place : place + length]) == list(range(epoch[place], epoch[place] + length))
        place += length


def test_epochs_differ_and_seeds_differ(shards: list[IndexedTokens]) -> None:
    stream = TokenStream(shards, seed=7)
    n = stream.tokens_per_epoch
    first, second = stream.read(0, n), stream.read(n, n)
    assert sorted(first) == sorted(second) and list(first) != list(second)
    assert list(first) != list(TokenStream(shards, seed=8).read(0, n))


@given(start=st.integers(0, 10_000), count=st.integers(1, 3_000))
@settings(max_examples=50, deadline=None)
def test_any_piece_equals_the_same_piece_of_a_long_read(shards: list[IndexedTokens], start: int, count: int) -> None:
    whole = TokenStream(shards, seed=3).read(0, start + count)
    assert np.array_equal(TokenStream(shards, seed=3).read(start, count), whole[start:])


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


def test_labels_are_the_next_tokens_of_the_stream(shards: list[IndexedTokens]) -> None:
    stream = TokenStream(shards, seed=1)
    inputs, labels = PhaseWindows([stream], np.array([1.0]), [0], seq_len=8).read(5, 40)
    expected = stream.read(5 * 8, 40 * 8 + 1)
    assert np.array_equal(inputs.reshape(-1), expected[:-1])
    assert np.array_equal(labels.reshape(-1), expected[1:])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_ranks_and_micro_batches_do_not_change_the_order(
    shards: list[IndexedTokens], ranks: int, micro_batch_size: int
) -> None:
    windows = PhaseWindows(
        [TokenStream(shards, 1), TokenStream(shards, 2)], np.array([0.75, 0.25]), [0, 100], seq_len=4
    )
    layout = BatchLayout(micro_batch_size, 64 // ranks // micro_batch_size, ranks)
    for step in (0, 3):
        per_rank = [PhaseBatches(windows, layout, rank, 0, 4).batch(step)[0] for rank in range(ranks)]
        together = np.stack([ids.numpy() for ids in per_rank], axis=1).reshape(-1, 4)
        assert np.array_equal(together, windows.read(step * 64, 64)[0])


def test_phases_of_rising_length_read_each_source_without_gap_or_repeat(shards: list[IndexedTokens]) -> None:
    """What a whole curriculum feeds the model, source by source, is the source's stream from its beginning."""
    streams = [TokenStream(shards, 1), TokenStream(shards, 2)]
    positions, fed = [0, 0], ([], [])
    for seq_len, n_windows, share in ((2, 100, 0.9), (8, 50, 0.5), (32, 25, 0.2)):
        windows = PhaseWindows(streams, np.array([share, 1 - share]), positions, seq_len)
        inputs, _ = windows.read(0, n_windows)
        for source, row in zip(windows.blend.sources(0, n_windows), inputs, strict=True):
            fed[source].extend(row.tolist())
        positions = [p + t for p, t in zip(positions, windows.tokens_per_source(n_windows), strict=True)]
    for source in (0, 1):
        assert fed[source] == streams[source].read(0, positions[source]).tolist()
        assert max(Counter(fed[source]).values()) == 1


def test_steps_come_one_after_another_from_any_step_on(shards: list[IndexedTokens]) -> None:
    windows = PhaseWindows([TokenStream(shards, 1)], np.array([1.0]), [0], seq_len=4)
    batches = PhaseBatches(windows, BatchLayout(2, 3, 1), 0, 5, 17)
    steps = list(batches)
    assert len(steps) == len(batches) == 12
    for step, (ids_ABT, labels_ABT) in enumerate(steps, start=5):
        inputs, labels = windows.read(step * 6, 6)
        assert np.array_equal(ids_ABT.numpy().reshape(6, 4), inputs)
        assert np.array_equal(labels_ABT.numpy().reshape(6, 4), labels)


@pytest.mark.gpu
def test_steps_for_a_gpu_are_the_same_ones_in_pinned_memory(shards: list[IndexedTokens]) -> None:
    windows, layout = PhaseWindows([TokenStream(shards, 1)], np.array([1.0]), [0], seq_len=4), BatchLayout(2, 3, 1)
    gpu = torch.device("cuda", torch.cuda.current_device())
    plain, pinned = (PhaseBatches(windows, layout, 0, 0, 9, pinned=pinned) for pinned in (False, True))
    for (ids_ABT, labels_ABT), for_gpu in zip(plain, pinned, strict=True):
        assert all(x.is_pinned() for x in for_gpu)
        copied = [x.to(gpu, non_blocking=True) for x in for_gpu]
        assert torch.equal(copied[0].cpu(), ids_ABT) and torch.equal(copied[1].cpu(), labels_ABT)
