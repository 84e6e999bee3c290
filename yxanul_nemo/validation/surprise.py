"""Surprise ratios: how much harder a domain is than the average one, and what that says about the blend."""

from collections.abc import Mapping


def surprise_ratios(values: Mapping[str, float]) -> dict[str, float]:
    """Each domain's value over the mean of all: of perplexities as the recipe's author defines it, or of bits per byte, where domains
    compare fairly (perplexity per token depends on how long the tokens of a domain are)."""
    mean = sum(values.values()) / len(values)
    return {name: value / mean for name, value in values.items()}


def advice(ratio: float) -> str:
    """What a surprise ratio suggests; between the bounds, nothing."""
    if ratio > 1.5:
        return "struggles: more of its data"
    if ratio > 1.3:
        return "more of its data"
    if ratio < 0.8:
        return "excels: less of its data"
    if ratio < 0.85:
        return "less of its data"
    return ""
