"""The charts of one run, each against tokens, with the phases as bands."""

import numpy as np
from matplotlib.axes import Axes

from yxanul_nemo.curriculum.schedule import learning_rate
from yxanul_nemo.figures import count
from yxanul_nemo.report.gather import Run
from yxanul_nemo.report.style import (
    COLORS,
    INK,
    MUTED,
    Chart,
    count_axis,
    finish,
    panels,
    phase_bands,
    styled,
    thinned,
    token_axis,
)

SMOOTHED_FROM = 100
"""Records; with fewer the line itself is quiet enough."""
LABEL_SHARE = 0.07
"""Of a chart's width, that a label takes."""
BOUNDS = (0.85, 1.3)
"""Of surprise ratios: beyond them the blend should change (`validation.record.advice`)."""


def charts(run: Run) -> dict[str, Chart]:
    """All charts that the run has data for, by name."""
    made: list[Chart | None] = []
    if len(run.records["tokens_total"]):
        made += [loss_chart(run), speed_chart(run), gradient_chart(run)]
    made += [schedule_chart(run), validation_chart(run), sources_chart(run)]
    return {chart.name: chart for chart in made if chart is not None}


@styled
def loss_chart(run: Run) -> Chart:
    """Training loss and bits per byte, with the held-out mean at the ends of phases."""
    figure, (loss, bits) = panels(2, 5.0)
    for axes, column, title in (
        (loss, "loss_nats_per_token", "Training loss, nats per token"),
        (bits, "bits_per_byte", "Bits per byte"),
    ):
        _line(axes, run, column, COLORS[0], "training")
        axes.set_title(title, pad=18 if axes is loss else 8)
        phase_bands(axes, run.phases, _until(run), named=axes is loss)
    if run.validations:
        ends = {phase.number: phase.first_token + phase.tokens for phase in run.phases}
        means = [result["mean_bits_per_byte"] for result in run.validations.values()]
        places = [ends[number] for number in run.validations]
        bits.plot(places, means, "o", color=COLORS[1], markersize=6, label="held-out mean", clip_on=False, zorder=5)
        labelled = np.inf
        for x, y in reversed(list(zip(places, means, strict=True))):
            if labelled - x < LABEL_SHARE * _until(run) or x < 0.5 * LABEL_SHARE * _until(run):
                continue
            labelled = x
            bits.annotate(
                f"{y:.3f}", (x, y), (-6, 7), textcoords="offset points", ha="right", fontsize=8.5, color=COLORS[1]
            )
        bits.legend(loc="upper right")
    token_axis(bits)
    token_axis(loss, label=False)
    loss.set_xlim(0, _until(run))
    return finish(figure, "loss", "Loss in nats per token and bits per byte over training tokens")


@styled
def schedule_chart(run: Run) -> Chart:
    """Learning rate and clipping as planned, and as applied so far."""
    figure, (rate, clip) = panels(2, 3.6)
    at = np.unique(
        np.concatenate(
            [np.linspace(p.first_token + p.tokens_per_step, p.first_token + p.tokens, 60) for p in run.phases]
        )
    )
    scale = _of_phase(run, at, [p.lr_scale for p in run.phases])
    planned = [learning_rate(run.config.optim, x, run.total_tokens, s) for x, s in zip(at, scale, strict=True)]
    rate.plot(at, planned, color="#9ca3af", linewidth=1.2, label="plan")
    clip.step(at, _of_phase(run, at, [p.grad_clip for p in run.phases]), color="#9ca3af", linewidth=1.2, where="post")
    tokens = run.records["tokens_total"]
    if len(tokens):
        rate.plot(*thinned(tokens, run.records["learning_rate"]), color=COLORS[0], linewidth=2.2, label="applied")
        clip.plot(*thinned(tokens, run.records["grad_clip"]), color=COLORS[2], linewidth=2.2)
    rate.set_title("Learning rate", pad=18)
    clip.set_title("Gradient clipping")
    rate.legend(loc="upper right")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (rate, clip):
        axes.set_ylim(bottom=0)
        phase_bands(axes, run.phases, run.total_tokens, named=axes is rate)
        token_axis(axes, label=axes is clip)
        axes.set_xlim(0, run.total_tokens)
    return finish(figure, "schedule", "Learning rate and gradient clipping over the whole curriculum")


@styled
def speed_chart(run: Run) -> Chart:
    """Tokens/s with each phase's median and forecast; MFU where a peak is known."""
    has_mfu = bool(np.isfinite(run.records["mfu"]).any())
    figure, axes = panels(2 if has_mfu else 1, 4.6 if has_mfu else 2.8)
    speed = axes[0]
    tokens = run.records["tokens_total"]
    speed.plot(*thinned(tokens, run.records["tokens_per_second"]), color=COLORS[0], alpha=0.35, linewidth=1.0)
    for i, phase in enumerate(run.phases):
        median = run.median(phase.number, "tokens_per_second")
        span = [phase.first_token, phase.first_token + phase.tokens]
        if median is not None:
            begin, end = span[0], min(span[1], _until(run))
            speed.plot(
                [begin, end],
                [median] * 2,
                color=COLORS[0],
                linewidth=2.4,
                label="median of the phase" if not i else None,
            )
            if run.plan:
                forecast = run.plan.phases[i].tokens_per_second
                speed.plot([begin, end], [forecast] * 2, "--", color=COLORS[1], label="plan" if not i else None)
    speed.set_title("Tokens per second", pad=18)
    speed.set_ylim(bottom=0, top=_robust_top(run.records["tokens_per_second"], run))
    speed.legend(loc="lower right", ncols=2)
    count_axis(speed)
    if has_mfu:
        peak = np.nanmax(run.records["mfu_peak_flops_per_second"])
        mfu = 100 * run.records["mfu"]
        axes[1].plot(*thinned(tokens, mfu), color=COLORS[3])
        axes[1].set_title(f"Model FLOPs utilization, % of {peak / 1e12:,.0f} TFLOP/s")
        axes[1].set_ylim(bottom=0)
    for one in axes:
        phase_bands(one, run.phases, _until(run), named=one is speed)
        token_axis(one, label=one is axes[-1])
        one.set_xlim(0, _until(run))
    return finish(figure, "speed", "Tokens per second over training tokens, with each phase's median and forecast")


@styled
def gradient_chart(run: Run) -> Chart:
    """Norm before clipping, the limit, and steps whose update was skipped."""
    figure, (axes,) = panels(1, 2.8)
    tokens, norms = run.records["tokens_total"], run.records["grad_norm"]
    axes.plot(*thinned(tokens, norms, keep_peaks=True), color=COLORS[0], linewidth=1.2, label="norm before clipping")
    axes.plot(*thinned(tokens, run.records["grad_clip"]), "--", color=COLORS[1], drawstyle="steps-post", label="limit")
    skipped = run.records["skipped_steps"] > 0
    if skipped.any():
        for x in tokens[skipped]:
            axes.axvline(x, color="#dc2626", linewidth=1.0, alpha=0.7)
        axes.plot([], [], color="#dc2626", label=f"{int(np.nansum(run.records['skipped_steps']))} skipped steps")
    finite = norms[np.isfinite(norms)]
    if len(finite) and finite.max() > 20 * np.median(finite):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title("Gradient norm", pad=18)
    phase_bands(axes, run.phases, _until(run), named=True)
    token_axis(axes)
    axes.set_xlim(0, _until(run))
    axes.legend(loc="upper right", ncols=3)
    return finish(figure, "gradients", "Gradient norm and its limit over training tokens")


@styled
def validation_chart(run: Run) -> Chart | None:
    """Bits per byte of each domain at the ends of phases, and surprise ratios; None before the first validation."""
    if not run.validations:
        return None
    figure, (bits, ratios) = panels(1, 3.3, columns=2, share_x=True)
    numbers = sorted(run.validations)
    names = list(run.validations[numbers[-1]]["domains"])
    for name, color in zip(names, _cycle(len(names)), strict=True):
        there = [n for n in numbers if name in run.validations[n]["domains"]]
        scores = [run.validations[n]["domains"][name] for n in there]
        values = [score["bits_per_byte"] for score in scores]
        errors = [score["bits_per_byte_standard_error"] for score in scores]
        bits.errorbar(there, values, errors, color=color, marker="o", markersize=5, capsize=3, elinewidth=1, label=name)
        surprise = [run.validations[n]["surprise_ratio_bits_per_byte"][name] for n in there]
        ratios.plot(there, surprise, color=color, marker="o", markersize=5)
    ratios.axhline(1.0, color="#9ca3af", linewidth=1.0)
    for bound, words in zip(BOUNDS, ("less of its data below", "more of its data above"), strict=True):
        ratios.axhline(bound, color="#9ca3af", linewidth=1.0, linestyle=":")
        ratios.annotate(words, (0.99, bound), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                        ha="right", fontsize=8, color=MUTED)  # fmt: skip
    low, high = ratios.get_ylim()
    ratios.set_ylim(min(low, 0.8), max(high, 1.36))
    bits.set_title("Held-out bits per byte")
    ratios.set_title("Surprise ratio (domain / mean)")
    bits.legend(loc="upper right")
    lengths = {phase.number: phase.seq_len for phase in run.phases}
    for axes in (bits, ratios):
        axes.set_xticks(numbers, [f"{n}\n{lengths[n]}" for n in numbers])
        axes.set_xlim(min(numbers) - 0.4, max(numbers) + 0.4)
        axes.set_xlabel("after phase, length in tokens")
    return finish(figure, "validation", "Held-out bits per byte and surprise ratio of each domain after each phase")


@styled
def sources_chart(run: Run) -> Chart | None:
    """Share of each source in what each phase has read; None where nothing is trained, or of a single source."""
    names = run.config.data.source_names
    if run.ledger is None or not run.ledger.phases or len(names) < 2:
        return None
    figure, (axes,) = panels(1, 0.9 + 0.34 * len(run.ledger.phases))
    rows = list(run.ledger.phases)
    places = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for name, color in zip(names, _cycle(len(names)), strict=True):
        shares = np.array([100 * row.tokens_per_source.get(name, 0) / max(1, row.consumed_tokens) for row in rows])
        axes.barh(places, shares, left=left, color=color, height=0.62, label=name, edgecolor="white", linewidth=1)
        for y, share, begin in zip(places, shares, left, strict=True):
            if share >= 6:
                axes.text(begin + share / 2, y, f"{share:.0f}%", ha="center", va="center", color="white", fontsize=8.5)
        left += shares
    axes.set_yticks(places, [f"phase {row.index}, {count(row.consumed_tokens)} tokens" for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.xaxis.set_visible(False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlim(0, 100)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(6, len(names)))
    return finish(figure, "sources", "Share of each source in the tokens of each phase")


def _line(axes: Axes, run: Run, column: str, color: str, label: str) -> None:
    tokens, values = run.records["tokens_total"], run.records[column]
    if len(tokens) < SMOOTHED_FROM:
        axes.plot(*thinned(tokens, values), color=color, label=label)
        return
    axes.plot(*thinned(tokens, values), color=color, alpha=0.25, linewidth=0.8)
    there = np.isfinite(values)
    axes.plot(*thinned(tokens[there], smoothed(values[there])), color=color, label=f"{label}, smoothed")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, about a fiftieth of all; fewer towards both ends, so that nothing lags."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, len(values) - 1 - places), max(1, len(values) // 100))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _until(run: Run) -> float:
    """Right end of charts of what was trained."""
    return float(run.records["tokens_total"].max())


def _of_phase(run: Run, tokens: np.ndarray, values: list[float]) -> np.ndarray:
    """A value for each phase, at the steps with which those tokens are consumed."""
    ends = np.array([phase.first_token + phase.tokens for phase in run.phases])
    return np.array(values)[np.searchsorted(ends, tokens)]


def _robust_top(values: np.ndarray, run: Run) -> float:
    forecasts = [p.tokens_per_second for p in run.plan.phases if p.done] if run.plan else []
    return 1.12 * max([float(np.nanpercentile(values, 99)), *forecasts])


def _cycle(length: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(length)]
