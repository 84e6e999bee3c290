"""How all charts look, and how they become pictures: PNG files, and SVG inside the page."""

import base64
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.figures import count
from yxanul_nemo.files import atomic_file

INK, MUTED, GRID, BAND = "#1f2937", "#6b7280", "#e5e7eb", "#f3f4f6"
COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#4b5563")
"""Told apart on white by people with the common kinds of colour blindness as well, in this order."""
WIDTH_INCHES = 10.0
PNG_DPI = 144
MAX_POINTS = 1200
"""Of one line in a chart; more cannot be seen."""
SETTINGS: dict[Any, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": "#d1d5db",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "yxanul",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Chart:
    """A finished picture."""

    name: str
    """Of its PNG file, without the suffix."""
    alt: str
    """What it shows, in a sentence."""
    svg: bytes
    png: bytes

    @property
    def data_uri(self) -> str:
        """The SVG, to stand inside the page."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()

    def save(self, folder: Path) -> None:
        """Write the PNG."""
        with atomic_file(folder / f"{self.name}.png") as handle:
            handle.write(self.png)


def styled[**P, R](draw: Callable[P, R]) -> Callable[P, R]:
    """Draw under the charts' settings and no others."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **named: P.kwargs) -> R:
        with mpl.rc_context(SETTINGS):
            return draw(*arguments, **named)

    return drawn


def panels(rows: int, height_inches: float, *, columns: int = 1, share_x: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with axes from left to right and top to bottom."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share_x, squeeze=False)
    return figure, list(axes.flat)


def finish(figure: Figure, name: str, alt: str) -> Chart:
    """Turn a figure into pictures."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=PNG_DPI)
    return Chart(name, alt, svg.getvalue(), png.getvalue())


def token_axis(axes: Axes, label: bool = True) -> None:
    """The horizontal axis counts tokens."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value, 3) if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.margins(x=0)
    if label:
        axes.set_xlabel("tokens")


def count_axis(axes: Axes) -> None:
    """The vertical axis has thousands and millions."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value, 3) if value else "0"))


def phase_bands(axes: Axes, phases: Sequence[Phase], until: float, *, named: bool = False) -> None:
    """Every other phase shaded; `named`: with number and length above, where there is room for it."""
    for phase in phases:
        begin, end = phase.first_token, min(phase.first_token + phase.tokens, until)
        if begin >= until:
            break
        if phase.number % 2 == 0:
            axes.axvspan(begin, end, color=BAND, zorder=0, linewidth=0)
        if named and (end - begin) / until > 0.035:
            wide = (end - begin) / until > 0.12
            axes.annotate(
                f"phase {phase.number}: {phase.seq_len}" if wide else f"{phase.seq_len}",
                ((begin + end) / 2, 1.0),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color=MUTED,
            )


def thinned(x: np.ndarray, y: np.ndarray, *, keep_peaks: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points: means of neighbours, or their largest values; points without a value are left out."""
    there = np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(x)))
    middle = np.maximum.reduceat(y, edges) if keep_peaks else np.add.reduceat(y, edges) / sizes
    return np.add.reduceat(x, edges) / sizes, middle
