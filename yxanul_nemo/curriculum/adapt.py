"""`curriculum.adapt_blend`: the next phase's shares, moved by how surprising each source's domain was. A pure function, no torch.

The ledger keeps the blend that a phase began with, so that a resumed phase never computes it anew.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.data.blend import normalized_shares

DIGITS = 4
"""Shares are rounded to this, so that the last bits of a sum on another machine change nothing; `data.blend` knows no finer ones."""


def sources_of_domains(config: RunConfig) -> dict[str, str]:
    """Domain -> the data source whose share it moves; domains that speak for none are left out."""
    sources = config.data.source_names
    chosen = {name: domain.for_source or domain.source or name for name, domain in config.validation.domains.items()}
    return {name: source for name, source in chosen.items() if source in sources}


def adapted_blend(
    config: RunConfig, blend: Mapping[str, float] | None, sizes: Mapping[str, int], ratios: Mapping[str, float]
) -> dict[str, float]:
    """A phase's shares times the surprise ratios of its sources, each kept within `curriculum.adapt_blend_bounds`.

    Args:
        blend: the configured shares; None: in proportion to `sizes`.
        sizes: source -> tokens.
        ratios: domain -> surprise ratio of bits per byte. A source of several domains gets their mean, one of none gets 1.

    Returns:
        Source -> share, adding up to 1 but for the rounding; a share of 0 stays 0.
    """
    names = list(sizes)
    of_source: dict[str, list[float]] = {name: [] for name in names}
    for domain, source in sources_of_domains(config).items():
        of_source[source].append(ratios[domain])
    low, high = config.curriculum.adapt_blend_bounds
    factors = [min(high, max(low, sum(found) / len(found))) if (found := of_source[name]) else 1.0 for name in names]
    moved = normalized_shares(names, blend, sizes) * np.array(factors)
    return {name: round(float(share), DIGITS) for name, share in zip(names, moved / moved.sum(), strict=True)}


def largest_shares(shares: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """The largest share [sources] that each source could get: its own factor at the upper bound, all others at the lower."""
    low, high = bounds
    return shares * high / (shares * high + (1 - shares) * low)
