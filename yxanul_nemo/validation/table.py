"""A validation result as lines of text."""

from collections.abc import Mapping
from typing import Any

from yxanul_nemo.validation.bootstrap import PairedDifference
from yxanul_nemo.validation.record import advice


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
    if (own := result.get("at_phase_len")) is not None:
        label = f"mean at {own['eval_len_tokens']} tokens"
        lines.append(f"{label:<28}{own['mean_bits_per_byte']:>11.4f}")
    return "\n".join(lines)


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
