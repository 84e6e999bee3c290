"""`curriculum.adapt_blend`: the next phase's shares, moved by how surprising each source's domain was. A pure function, no torch.

The ledger keeps the blend that a phase began with, so that a resumed phase never computes it anew.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.errors import UserError
from yxanul_nemo.validation.record import phase_result_path

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


def ratios_after(run_dir: Path, number: int, tokens: int) -> dict[str, float]:
    """Surprise ratios of bits per byte, by domain, as recorded at the end of phase `number`.

    Args:
        tokens: of the run, at that end.

    Raises:
        UserError: it is missing or of another state.
    """
    path = phase_result_path(run_dir, number)
    fix = f"Run `python launcher.py stage=train phases={number}`, which validates again, or set curriculum.adapt_blend=false."
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["tokens_total"] != tokens:
            raise UserError(path, f"is of {result['tokens_total']:,} tokens", f"{tokens:,}, where the run stands", fix)
        ratios = {name: float(ratio) for name, ratio in result["surprise_ratio_bits_per_byte"].items()}
    except FileNotFoundError:
        raise UserError(path, "does not exist", "the validation that adapts the blend of the next phase", fix) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(path, f"cannot be read ({error})", "a validation result", fix) from None
    return ratios
