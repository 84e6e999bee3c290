"""Which source each window of a phase comes from: exact shares, by a fixed periodic pattern."""

from collections.abc import Mapping, Sequence

import numpy as np

PERIOD = 10_000
"""Windows in one period; shares are exact to 1 / PERIOD in every period, and within one window inside it."""


def normalized_shares(names: Sequence[str], blend: Mapping[str, float] | None, sizes: Mapping[str, int]) -> np.ndarray:
    """Shares [sources] that sum to 1: the blend where one is given, else in proportion to the sources' sizes in tokens."""
    weights = np.array([float((blend or sizes).get(name, 0.0)) for name in names])
    assert weights.min() >= 0 and weights.sum() > 0, "the configuration is checked before"
    return weights / weights.sum()


class Blend:
    """A periodic assignment of windows to sources. Window k comes from `source(k)`, and is the `count(k)[source]`-th of its source.

    The pattern gives each window to the source that is furthest behind its share, so any prefix is within one window
    of exact. It depends on the shares alone: no state to save, any window found at once.
    """

    def __init__(self, shares: np.ndarray):
        counts = np.floor(shares * PERIOD).astype(np.int64)
        # Largest remainders take what rounding down left over.
        for i in np.argsort(-(shares * PERIOD - counts), kind="stable")[: PERIOD - counts.sum()]:
            counts[i] += 1
        self.counts = counts
        self.pattern = _furthest_behind(counts)
        one_hot = self.pattern[:, None] == np.arange(len(counts))[None, :]
        self.before = np.concatenate([np.zeros((1, len(counts)), np.int64), np.cumsum(one_hot, axis=0)])

    def sources(self, first: int, count: int) -> np.ndarray:
        """Source index of windows first .. first + count - 1."""
        return self.pattern[(first + np.arange(count)) % PERIOD]

    def windows_before(self, window: int) -> np.ndarray:
        """Windows [sources] that come before window number `window` in the phase."""
        return (window // PERIOD) * self.counts + self.before[window % PERIOD]


def _furthest_behind(counts: np.ndarray) -> np.ndarray:
    if (counts > 0).sum() == 1:
        return np.full(PERIOD, int(np.argmax(counts)), dtype=np.int16)
    # The j-th window of a source with c windows is due at (j + 1/2) / c of the period; sorting the due times is that rule.
    due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts if c])
    source = np.concatenate([np.full(c, i, dtype=np.int16) for i, c in enumerate(counts) if c])
    return source[np.argsort(due, kind="stable")]
