"""Tables and a picture of what `benchmarks.evidence` measured.

    python -m benchmarks.evidence_tables EVIDENCE.json --bench BENCH.json ... --chart docs/evidence.png [--restart-seconds 20]

Runs that share a GPU have no wall time of their own, so times are computed: tokens of a phase over the tokens/s that `stage=bench`
measured for its shape and precision on an idle GPU, and, where it is given, `--restart-seconds` for each change of phase.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOMAINS = ("docs", "english", "math", "code")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
Speeds = Mapping[tuple[str, int], float]
"""(precision, seq_len) -> tokens/s."""


def speeds_of(paths: Sequence[Path]) -> dict[tuple[str, int], float]:
    """What `stage=bench` wrote."""
    return {
        (case["precision"], case["seq_len"]): case["tokens_per_second"]
        for path in paths
        for case in json.loads(path.read_text())["cases"]
        if case.get("tokens_per_second")
    }


def cost_at(run: Mapping[str, Any], tokens: float, per_token: Sequence[float], per_restart: float = 0.0) -> float:
    """Sum over the phases up to `tokens` of tokens x cost, and of `per_restart` for each phase begun after the first."""
    total, begins = 0.0, 0.0
    for number, (phase, cost) in enumerate(zip(run["phases"], per_token, strict=True)):
        if tokens <= begins:
            break
        total += min(phase["tokens"], tokens - begins) * cost + (per_restart if number else 0.0)
        begins += phase["tokens"]
    return total


def seconds_at(run: Mapping[str, Any], tokens: float, speeds: Speeds, restart_seconds: float) -> float:
    """Training time up to `tokens`, computed."""
    return cost_at(
        run, tokens, [1 / speeds[run["precision"], phase["seq_len"]] for phase in run["phases"]], restart_seconds
    )


def flops_at(run: Mapping[str, Any], tokens: float) -> float:
    """Model FLOPs up to `tokens`."""
    return cost_at(run, tokens, [phase["flops_per_token"] for phase in run["phases"]])


def curve(run: Mapping[str, Any], domain: str = "docs") -> tuple[list[float], list[float]]:
    """Tokens and bits per byte: validations inside phases and, of a finished run, the end, which is on more documents."""
    points = [(v["tokens"], v[domain]) for v in run["in_phase"]]
    if "final" in run:
        points.append((sum(phase["tokens"] for phase in run["phases"]), run["final"][domain]))
    return [t for t, _ in points], [b for _, b in points]


def tokens_to_reach(run: Mapping[str, Any], target: float) -> float | None:
    """Tokens at which the curve of `docs` first falls to `target`, between validations by interpolation; None: it never does."""
    for (t0, b0), (t1, b1) in itertools.pairwise(zip(*curve(run), strict=True)):
        if b1 <= target:
            return t0 if b0 <= target else t0 + (b0 - target) / (b0 - b1) * (t1 - t0)
    return None


def table(runs: Mapping[str, Mapping[str, Any]], speeds: Speeds, control: str) -> str:
    """Markdown, a row for each run."""
    target = runs[control]["final"]["docs"]
    head = ("run", "lr", *DOMAINS, "mean tokens/s", "train time s", "FLOPs 1e15", f"s to {target:.3f}", "skipped")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, run in runs.items():
        if "final" not in run:
            continue
        total = sum(phase["tokens"] for phase in run["phases"])
        try:
            seconds = seconds_at(run, total, speeds, 0.0)
            reached = tokens_to_reach(run, target)
            to_target = "-" if reached is None else f"{seconds_at(run, reached, speeds, 0.0):.0f}"
            speed, took = f"{total / seconds / 1e3:.0f}k", f"{seconds:.0f}"
        except KeyError:
            speed = took = to_target = "?"
        cells = (
            name, f"{run['learning_rate']:g}", *(f"{run['final'][d]:.4f}" for d in DOMAINS), speed, took,
            f"{flops_at(run, total) / 1e15:.1f}", to_target, str(run["skipped_steps"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(runs: Mapping[str, Mapping[str, Any]], speeds: Speeds, restart_seconds: float, path: Path) -> None:
    """Bits per byte of held-out text over tokens, computed time and FLOPs."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for (name, run), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
        tokens, bits = curve(run)
        style = {
            "color": color,
            "label": name,
            "marker": "o",
            "markersize": 3,
            "linewidth": 1.4,
            "linestyle": "-" if "final" in run else ":",
        }
        axes[0].plot(np.array(tokens) / 1e6, bits, **style)
        with contextlib.suppress(KeyError):  # No speed was measured for its shapes.
            axes[1].plot([seconds_at(run, t, speeds, restart_seconds) for t in tokens], bits, **style)
        axes[2].plot([flops_at(run, t) / 1e15 for t in tokens], bits, **style)
    for axis, label in zip(
        axes, ("million tokens", "seconds of training (computed)", "model FLOPs, 1e15"), strict=True
    ):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("bits per byte, held-out documentation")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path)
    parser.add_argument("--bench", type=Path, nargs="*", default=[])
    parser.add_argument("--runs", nargs="+", help="which, in this order; all")
    parser.add_argument("--control", default="fixed_2048")
    parser.add_argument("--restart-seconds", type=float, default=0.0)
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    found = json.loads(arguments.evidence.read_text())
    # What is kept in `benchmarks/results` also has runs that were cut off, which are dotted.
    found = found.get("runs", found) | found.get("unfinished", {})
    runs = {name: found[name] for name in arguments.runs or found}
    speeds = speeds_of(arguments.bench)
    print(table(runs, speeds, arguments.control))
    if arguments.chart:
        chart(runs, speeds, arguments.restart_seconds, arguments.chart)


if __name__ == "__main__":
    main()
