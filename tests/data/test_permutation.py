"""Computed permutations: bijections that look like random ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from yxanul_nemo.data.permutation import KeyedPermutation


@given(size=st.integers(1, 5_000), key=st.integers())
@settings(max_examples=60, deadline=None)
def test_every_element_comes_once(size: int, key: int) -> None:
    assert sorted(KeyedPermutation(size, key)(np.arange(size)).tolist()) == list(range(size))


@given(size=st.integers(1, 2**62), key=st.text(), first=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_elements_of_huge_permutations_are_found_alone(size: int, key: str, first: int) -> None:
    permutation = KeyedPermutation(size, key)
    indices = (first + np.arange(50)) % size
    together = permutation(indices)
    assert together.min() >= 0 and together.max() < size
    assert len(set(together.tolist())) == len(set(indices.tolist()))
    assert [int(permutation(indices[i : i + 1])[0]) for i in range(50)] == together.tolist()


def test_keys_give_different_permutations() -> None:
    keys = [(1, "a"), (2, "a"), (1, "b"), (1, "a", 0), ("1a",)]
    found = {tuple(KeyedPermutation(1000, *key)(np.arange(1000)).tolist()) for key in keys}
    assert len(found) == len(keys)


@pytest.mark.parametrize("size", [7, 100, 1000])
def test_places_are_as_evenly_filled_as_by_random_permutations(size: int) -> None:
    """Over many keys each element stands at each place as often as chance has it (chi squared, 1 in 10,000)."""
    keys = 40 * size if size < 1000 else 2000
    groups = min(size, 20)
    counts = np.zeros((groups, groups))
    group_of = np.arange(size) * groups // size
    for key in range(keys):
        np.add.at(counts, (group_of, group_of[KeyedPermutation(size, key)(np.arange(size))]), 1)
    sizes = np.bincount(group_of)
    expected = keys * np.outer(sizes, sizes) / size
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert statistic < chi2.ppf(0.9999, (groups - 1) ** 2)


def test_neighbours_are_not_kept_together() -> None:
    """The distance of elements that were neighbours is that of random pairs: a third of the range on the mean."""
    size = 100_000
    order = KeyedPermutation(size, "neighbours")(np.arange(size))
    distance = np.abs(np.diff(order)).mean() / size
    assert abs(distance - 1 / 3) < 0.01 and abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.02
