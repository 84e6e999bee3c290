"""The page that compares runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from yxanul_nemo.config.changes import leaves
from yxanul_nemo.figures import clock, count
from yxanul_nemo.report.charts import SMOOTHED_FROM, smoothed
from yxanul_nemo.report.gather import Run
from yxanul_nemo.report.page import Section, Table, render
from yxanul_nemo.report.single import NONE, state
from yxanul_nemo.report.style import COLORS, Chart, count_axis, finish, panels, styled, thinned, token_axis

NOT_COMPARED = ("run", "report", "plan", "bench", "runs", "stage", "phases", "allow", "logging")
"""Sections of the configuration that do not decide what is trained."""


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two are equal, with as much of their paths as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    labels = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        labels.append("-".join(own[-length:]))
    return labels


def comparison_charts(runs: Sequence[Run]) -> dict[str, Chart]:
    """All charts that compare, by name."""
    made = [_curves(runs), _speeds(runs)]
    if any(run.validations for run in runs):
        made.append(_validations(runs))
    return {chart.name: chart for chart in made}


def comparison_page(
    runs: Sequence[Run], charts: Mapping[str, Chart], grid: tuple[list[str], list[list[str]]] | None = None
) -> str:
    """Return the page's HTML.

    Args:
        grid: header and rows of a sweep's table, which comes first.
    """
    differing = _differences(runs)
    sections = [
        *([Section("grid", "Grid", "Means over seeds, the best first.", (), [Table(*grid)])] if grid else []),
        Section("results", "Results", "", (), [_results(runs)]),
        Section(
            "loss",
            "Bits per byte",
            "Of the training text, which phases and blends choose; over tokens and over time in training steps.",
            [charts["loss"]],
        ),
        Section(
            "validation",
            "Held-out text",
            "At the ends of phases. Domains compare only where both runs were scored on the same text.",
            [charts["validation"]] if "validation" in charts else [],
            [_domains(runs)] if "validation" in charts else [],
        ),
        Section("speed", "Speed", "Tokens per second of training steps.", [charts["speed"]]),
        Section(
            "settings",
            "Settings that differ",
            "" if differing.rows else "None that decides what is trained.",
            (),
            [differing] if differing.rows else [],
        ),
    ]
    return render(
        "comparison.html",
        title=" and ".join(run.label for run in runs),
        colored=list(zip(runs, _colors(runs), strict=True)),
        sections=sections,
    )


@styled
def _curves(runs: Sequence[Run]) -> Chart:
    figure, (over_tokens, over_time) = panels(1, 3.6, columns=2, share_x=False)
    unit, unit_seconds = ("hours", 3600) if max(run.training_seconds for run in runs) > 2 * 3600 else ("minutes", 60)
    for run, color in zip(runs, _colors(runs), strict=True):
        there = np.isfinite(run.records["bits_per_byte"])
        tokens, bits = run.records["tokens_total"][there], run.records["bits_per_byte"][there]
        seconds = np.cumsum(np.diff(tokens, prepend=0.0) / run.records["tokens_per_second"][there])
        line = smoothed(bits) if len(bits) >= SMOOTHED_FROM else bits
        over_tokens.plot(*thinned(tokens, line), color=color, label=run.label)
        over_time.plot(*thinned(seconds / unit_seconds, line), color=color)
    token_axis(over_tokens)
    over_tokens.set_title("Training bits per byte over tokens")
    over_time.set_title(f"Training bits per byte over {unit} in training steps")
    over_time.set_xlabel(unit)
    over_time.margins(x=0)
    for axes in (over_tokens, over_time):
        axes.set_xlim(left=0)
    over_tokens.legend(loc="upper right")
    return finish(figure, "loss", "Training bits per byte of each run over tokens and over time")


@styled
def _speeds(runs: Sequence[Run]) -> Chart:
    figure, (axes,) = panels(1, 2.8)
    for run, color in zip(runs, _colors(runs), strict=True):
        axes.plot(*thinned(run.records["tokens_total"], run.records["tokens_per_second"]), color=color, label=run.label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_title("Tokens per second")
    axes.legend(loc="lower right")
    token_axis(axes)
    count_axis(axes)
    return finish(figure, "speed", "Tokens per second of each run over tokens")


@styled
def _validations(runs: Sequence[Run]) -> Chart:
    figure, (axes,) = panels(1, 2.9)
    for run, color in zip(runs, _colors(runs), strict=True):
        ends = {phase.number: phase.first_token + phase.tokens for phase in run.phases}
        points = [(ends[number], result["mean_bits_per_byte"]) for number, result in sorted(run.validations.items())]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=color, marker="o", markersize=5, label=run.label
        )
    axes.set_title("Held-out bits per byte, mean of domains")
    axes.legend(loc="upper right")
    token_axis(axes)
    axes.margins(x=0.03)
    axes.set_xlim(left=0)
    return finish(figure, "validation", "Held-out bits per byte of each run at the ends of its phases")


def _results(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        speeds = run.records["tokens_per_second"]
        held_out = run.last_validation
        rows.append(
            [
                run.label,
                state(run),
                f"{run.trained_tokens:,}",
                clock(run.training_seconds) if run.training_seconds else NONE,
                count(run.trained_tokens / run.training_seconds, 3) if run.training_seconds else NONE,
                f"{int(np.nansum(run.records['skipped_steps'])) if len(speeds) else 0:,}",
                f"{held_out['mean_bits_per_byte']:.4f}" if held_out else NONE,
            ]
        )
    header = ["run", "state", "tokens", "time in steps", "tokens/s", "skipped steps", "held-out bits/byte"]
    return Table(header, rows, left=(0, 1), wrap=(1,))


def _domains(runs: Sequence[Run]) -> Table:
    names = list(dict.fromkeys(name for run in runs if run.last_validation for name in run.last_validation["domains"]))
    rows = []
    for name in names:
        scores = [(run.last_validation or {}).get("domains", {}).get(name) for run in runs]
        cells = [
            f"{score['bits_per_byte']:.4f} ± {score['bits_per_byte_standard_error']:.4f}" if score else NONE
            for score in scores
        ]
        rows.append([name, *cells])
    return Table(["domain, bits per byte", *(run.label for run in runs)], rows, title="After the last phase of each")


def _differences(runs: Sequence[Run]) -> Table:
    by_run = [
        {key: value for key, value in leaves(run.config) if key.partition(".")[0] not in NOT_COMPARED} for run in runs
    ]
    keys = list(dict.fromkeys(key for one in by_run for key in one))
    rows = [
        [key, *(json.dumps(one[key], ensure_ascii=False) if key in one else NONE for one in by_run)]
        for key in keys
        if len({json.dumps(one.get(key, NONE)) for one in by_run}) > 1
    ]
    columns = range(len(runs) + 1)
    return Table(["key", *(run.label for run in runs)], rows, left=tuple(columns), wrap=tuple(columns))


def _colors(runs: Sequence[Run]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]
