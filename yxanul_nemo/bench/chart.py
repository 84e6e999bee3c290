"""A benchmark as a picture: tokens/s over the sequence length, a line for each precision and micro-batch."""

from collections.abc import Sequence
from typing import Any

from yxanul_nemo.report.style import COLORS, Chart, count_axis, finish, panels, styled


@styled
def bench_chart(cases: Sequence[dict[str, Any]], device: str) -> Chart | None:
    """Medians with the distance of the quartiles as bars; None if no case could run.

    Args:
        cases: as `stage=bench` writes them.
    """
    measured = [case for case in cases if "error" not in case]
    if not measured:
        return None
    figure, (axes,) = panels(1, 4.2)
    lengths = sorted({case["seq_len"] for case in measured})
    # Where each length was measured once, as with the phases of a curriculum, the micro-batches differ along one line.
    once = len({(case["precision"], case["seq_len"]) for case in measured}) == len(measured)
    names = [case["precision"] if once else _with_micro_batch(case) for case in measured]
    for number, name in enumerate(sorted(set(names))):
        of_line = [case for case, its_name in zip(measured, names, strict=True) if its_name == name]
        line = sorted(of_line, key=lambda case: case["seq_len"])
        rates = [case["tokens_per_second"] for case in line]
        axes.errorbar(
            [lengths.index(case["seq_len"]) for case in line],
            rates,
            yerr=[rate * case["step_seconds_spread"] / 2 for rate, case in zip(rates, line, strict=True)],
            marker="o",
            markersize=5,
            color=COLORS[number % len(COLORS)],
            label=name,
        )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_xlabel("sequence length, tokens")
    axes.set_ylim(bottom=0)
    count_axis(axes)
    axes.set_title(f"Training step, tokens per second, {device}")
    axes.legend(loc="lower left")
    return finish(
        figure, "bench", f"Tokens per second of the training step at {len(lengths)} sequence lengths on {device}"
    )


def _with_micro_batch(case: dict[str, Any]) -> str:
    return f"{case['precision']}, micro-batches of {case['micro_batch_size'] * case['seq_len']:>6,} tokens"
