"""Tables and a picture of what `benchmarks.evidence` measured.

    python -m benchmarks.evidence_tables EVIDENCE.json --bench BENCH.json ... --chart docs/evidence.png [--restart-seconds 20]

Runs that differ in their seed alone (`NAME`, `NAME-seed2`, ...) are one arm: means over them, and the standard deviation of single runs.
Runs that share a GPU have no wall time of their own, so times are computed: tokens of a phase over the tokens/s that `stage=bench`
measured for its shape and precision on an idle GPU, and, where it is given, `--restart-seconds` for each change of phase.
"""

import argparse
import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOMAINS = ("docs", "english", "math", "code")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
Run = Mapping[str, Any]
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


def arms_of(runs: Mapping[str, Run]) -> dict[str, list[Run]]:
    """Runs by what they have in common but the seed, in order of appearance."""
    arms: dict[str, list[Run]] = {}
    for name, run in runs.items():
        arms.setdefault(re.sub(r"-seed\d+$", "", name), []).append(run)
    return arms


def cost_at(run: Run, tokens: float, per_token: Sequence[float], per_restart: float = 0.0) -> float:
    """Sum over the phases up to `tokens` of tokens x cost, and of `per_restart` for each phase begun after the first."""
    total, begins = 0.0, 0.0
    for number, (phase, cost) in enumerate(zip(run["phases"], per_token, strict=True)):
        if tokens <= begins:
            break
        total += min(phase["tokens"], tokens - begins) * cost + (per_restart if number else 0.0)
        begins += phase["tokens"]
    return total


def seconds_at(run: Run, tokens: float, speeds: Speeds, restart_seconds: float) -> float:
    """Training time up to `tokens`, computed."""
    return cost_at(
        run, tokens, [1 / speeds[run["precision"], phase["seq_len"]] for phase in run["phases"]], restart_seconds
    )


def flops_at(run: Run, tokens: float) -> float:
    """Model FLOPs up to `tokens`."""
    return cost_at(run, tokens, [phase["flops_per_token"] for phase in run["phases"]])


def total_tokens(run: Run) -> int:
    """Of all phases."""
    return sum(phase["tokens"] for phase in run["phases"])


def curve(run: Run, domain: str = "docs") -> tuple[list[float], list[float]]:
    """Tokens and bits per byte: validations inside phases and, at the end, that on all documents."""
    points = [(v["tokens"], v[domain]) for v in run["in_phase"]] + [(total_tokens(run), run["final"][domain])]
    return [t for t, _ in points], [b for _, b in points]


def tokens_to_reach(run: Run, target: float) -> float | None:
    """Tokens at which the curve of `docs` first falls to `target`, between validations by interpolation; None: it never does."""
    for (t0, b0), (t1, b1) in itertools.pairwise(zip(*curve(run), strict=True)):
        if b1 <= target:
            return t0 if b0 <= target else t0 + (b0 - target) / (b0 - b1) * (t1 - t0)
    return None


def perplexity(run: Run, domain: str) -> float:
    """Of the run's own tokens, at the end."""
    text = run["validated"][domain]
    return math.exp(run["final"][domain] * math.log(2) * text["bytes"] / text["tokens"])


def costs_table(arms: Mapping[str, Sequence[Run]], speeds: Speeds, control: str) -> str:
    """Markdown: bits per byte of each arm, and what it cost."""
    target = fmean(run["final"]["docs"] for run in arms[control])
    head = (
        "arm",
        "runs",
        "docs",
        "each run",
        *DOMAINS[1:],
        "tokens/s",
        "s",
        "FLOPs 1e15",
        f"s to {target:.3f}",
        "skipped",
    )
    rows = []
    for name, runs in arms.items():
        bits = [run["final"]["docs"] for run in runs]
        spread = f" +- {stdev(bits):.3f}" if len(bits) > 1 else ""
        cells = [name, str(len(runs)), f"{fmean(bits):.3f}{spread}", ", ".join(f"{b:.3f}" for b in bits)]
        cells += [f"{fmean(run['final'][domain] for run in runs):.3f}" for domain in DOMAINS[1:]]
        total = total_tokens(runs[0])
        try:
            seconds = seconds_at(runs[0], total, speeds, 0.0)
            reached = [tokens_to_reach(run, target) for run in runs]
            times = ["-" if t is None else f"{seconds_at(runs[0], t, speeds, 0.0):.0f}" for t in reached]
            cells += [f"{total / seconds / 1e3:.0f}k", f"{seconds:.0f}"]
        except KeyError:
            cells += ["?", "?"]
            times = ["?"]
        cells += [
            f"{flops_at(runs[0], total) / 1e15:.1f}",
            ", ".join(times),
            str(sum(run["skipped_steps"] for run in runs)),
        ]
        rows.append(cells)
    return markdown(head, rows)


def perplexity_table(arms: Mapping[str, Sequence[Run]]) -> str:
    """Markdown: perplexity per token, and how long the tokens are."""
    rows = [
        [
            name,
            f"{runs[0]['bytes_per_token']:.2f}",
            *(f"{fmean(perplexity(run, domain) for run in runs):,.0f}" for domain in DOMAINS),
        ]
        for name, runs in arms.items()
    ]
    return markdown(("arm", "bytes per token", *DOMAINS), rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def chart(arms: Mapping[str, Sequence[Run]], speeds: Speeds, restart_seconds: float, path: Path) -> None:
    """Bits per byte of held-out text over tokens, computed time and FLOPs; a line for each run, a color for each arm."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True)
    for (name, runs), color in zip(arms.items(), itertools.cycle(COLORS), strict=False):
        for number, run in enumerate(runs):
            tokens, bits = curve(run)
            style = {"color": color, "marker": "o", "markersize": 2.5, "linewidth": 1.2, "alpha": 0.8}
            label = name if number == 0 else None
            axes[0].plot(np.array(tokens) / 1e6, bits, label=label, **style)
            with contextlib.suppress(KeyError):  # No speed was measured for its shapes.
                axes[1].plot([seconds_at(run, t, speeds, restart_seconds) for t in tokens], bits, **style)
            axes[2].plot([flops_at(run, t) / 1e15 for t in tokens], bits, **style)
    labels = ("million tokens", "seconds of training (computed)", "model FLOPs, 1e15")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("bits per byte, held-out documentation")
    # The first points are those of untrained models.
    axes[0].set_ylim(top=2.5)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path)
    parser.add_argument("--bench", type=Path, nargs="*", default=[])
    parser.add_argument("--arms", nargs="+", help="which, in this order; all")
    parser.add_argument("--control", default="fixed_2048")
    parser.add_argument("--restart-seconds", type=float, default=0.0)
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    found = json.loads(arguments.evidence.read_text())
    # What is kept in `benchmarks/results` says beside the runs when they were done.
    arms = arms_of(found.get("runs", found))
    arms = {name: arms[name] for name in arguments.arms or arms}
    speeds = speeds_of(arguments.bench)
    print(costs_table(arms, speeds, arguments.control), perplexity_table(arms), sep="\n\n")
    if arguments.chart:
        chart(arms, speeds, arguments.restart_seconds, arguments.chart)


if __name__ == "__main__":
    main()
