"""Whether one model is better than another on the same documents: a paired bootstrap (Efron and Tibshirani, 1993, chapter 13).

Documents are drawn anew, with both models' nats together, so that what makes a document hard for both cancels out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 0
DRAWS_AT_ONCE = 4_000_000
"""Numbers drawn at once, for memory's sake."""


@dataclass(frozen=True)
class PairedDifference:
    """Bits per byte of the first model less those of the second: negative where the first is better."""

    difference: float
    low: float
    """Lower end of the 95% interval (percentiles)."""
    high: float
    """Upper end."""
    share_below_zero: float
    """Resamples in which the first model is the better one."""


def paired_bootstrap(
    nats: Mapping[str, tuple[np.ndarray, np.ndarray]], text_bytes: Mapping[str, np.ndarray]
) -> dict[str, PairedDifference]:
    """Each domain's difference, and that of the mean over domains as `mean`.

    Args:
        nats: domain -> the two models' nats [documents] of the same documents.
        text_bytes: domain -> bytes of UTF-8 [documents].
    """
    rng = np.random.default_rng(SEED)
    drawn, observed = {}, {}
    for name, (first, second) in nats.items():
        bits, sizes = (first - second) / math.log(2), text_bytes[name].astype(np.float64)
        observed[name] = bits.sum() / sizes.sum()
        drawn[name] = _resampled(bits, sizes, rng)
    drawn["mean"] = np.mean(list(drawn.values()), axis=0)
    observed["mean"] = float(np.mean(list(observed.values())))
    results = {}
    for name, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        results[name] = PairedDifference(float(observed[name]), float(low), float(high), float((values < 0).mean()))
    return results


def _resampled(bits: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ratios of sums [RESAMPLES] over documents drawn with replacement."""
    n = len(bits)
    out, done = np.empty(RESAMPLES), 0
    while done < RESAMPLES:
        count = min(RESAMPLES - done, max(1, DRAWS_AT_ONCE // n))
        chosen = rng.integers(0, n, size=(count, n))
        out[done : done + count] = bits[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
        done += count
    return out


def comparison_table(differences: Mapping[str, PairedDifference]) -> str:
    """One line per domain and the mean; what is not told apart at 95% is said so."""
    lines = [f"{'domain':<12}{'difference':>12}{'95% interval':>22}"]
    for name, value in differences.items():
        interval = f"{value.low:+.4f} to {value.high:+.4f}"
        verdict = (
            "the first is better"
            if value.high < 0
            else "the second is better"
            if value.low > 0
            else "no difference seen"
        )
        lines.append(f"{name:<12}{value.difference:>+12.4f}{interval:>22}  {verdict}")
    return "\n".join(lines)
