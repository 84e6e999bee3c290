"""A validation result as lines of text."""

from collections.abc import Mapping
from typing import Any

from yxanul_nemo.validation.surprise import advice


def table(result: Mapping[str, Any]) -> str:
    """One line per domain; the surprise ratio is that of bits per byte."""
    lines = [f"{'domain':<12}{'docs':>6}{'tokens':>10}{'bits/byte':>11}{'+-':>8}{'perplexity':>12}{'surprise':>10}"]
    for name, score in result["domains"].items():
        ratio = result["surprise_ratio_bits_per_byte"][name]
        lines.append(
            f"{name:<12}{score['documents']:>6}{score['tokens']:>10,}{score['bits_per_byte']:>11.4f}"
            f"{score['bits_per_byte_standard_error']:>8.4f}{score['perplexity']:>12.2f}{ratio:>10.3f}  {advice(ratio)}".rstrip()
        )
    lines.append(f"{'mean':<28}{result['mean_bits_per_byte']:>11.4f}")
    return "\n".join(lines)
