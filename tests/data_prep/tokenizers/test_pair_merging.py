"""Merging many sequences at once gives what the plain loop gives for each."""

import random
from itertools import pairwise

import numpy as np
import pytest

from data_prep.tokenizers.pair_merging import MOST_IDS, PairMerges


def plain_merge(ids: list[int], ranks: dict[tuple[int, int], tuple[int, int]], first: int, end: int) -> list[int]:
    """Byte-pair encoding by its definition: the pair of lowest rank, the leftmost of equal ones, until there is none."""
    ids = list(ids)
    while True:
        possible = [
            (ranks[pair][0], place)
            for place, pair in enumerate(pairwise(ids))
            if pair in ranks and first <= ranks[pair][0] < end
        ]
        if not possible:
            return ids
        place = min(possible)[1]
        ids[place : place + 2] = [ranks[ids[place], ids[place + 1]][1]]


def random_merges(generator: random.Random, letters: int, count: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(left, right) -> (rank, made)."""
    ranks: dict[tuple[int, int], tuple[int, int]] = {}
    while len(ranks) < count:
        known = letters + len(ranks)
        pair = (generator.randrange(known), generator.randrange(known))
        ranks.setdefault(pair, (len(ranks), known))
    return ranks


@pytest.mark.parametrize("seed", range(5))
def test_all_sequences_at_once(seed):
    generator = random.Random(seed)
    ranks = random_merges(generator, 4, 60)
    merges = PairMerges(*np.array([(*pair, made) for pair, (_, made) in ranks.items()]).T)
    sequences = [generator.choices(range(4), k=generator.randint(1, 30)) for _ in range(200)]
    starts = np.cumsum([0, *map(len, sequences)])
    for first, end in ((0, 60), (0, 20), (20, MOST_IDS), (60, 60)):
        ids = np.concatenate(sequences).astype(np.int32)
        alive = merges.merge(ids, starts[:-1], first, end)
        for number, sequence in enumerate(sequences):
            part = slice(starts[number], starts[number + 1])
            assert ids[part][alive[part]].tolist() == plain_merge(sequence, ranks, first, end)


def test_no_sequence_and_one_id():
    merges = PairMerges(np.array([0]), np.array([0]), np.array([1]))
    assert merges.merge(np.empty(0, np.int32), np.empty(0, np.int64), 0, 1).tolist() == []
    assert merges.merge(np.array([0], np.int32), np.array([0]), 0, 1).tolist() == [True]


def test_ranks_of_every_pair():
    """More pairs than the table has slots, so that each way through it is gone."""
    ranks = random_merges(random.Random(0), 4, 300)
    merges = PairMerges(*np.array([(*pair, made) for pair, (_, made) in ranks.items()]).T)
    left, right = (side.ravel() for side in np.meshgrid(np.arange(320), np.arange(320)))
    expected = [ranks.get(pair, (-1, 0))[0] for pair in zip(left.tolist(), right.tolist(), strict=True)]
    assert merges.ranks(left, right).tolist() == expected
