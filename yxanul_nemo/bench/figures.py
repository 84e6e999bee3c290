"""What `stage=bench` measured: `run.dir/bench/*.json` with a chart beside it, and tables for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from yxanul_nemo.bench.cases import Shape, Sweep
from yxanul_nemo.bench.chart import bench_chart
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.figures import GIB, duration
from yxanul_nemo.files import atomic_file, write_json_atomic
from yxanul_nemo.log import table_console

KERNELS_SHOWN = 20
COLUMNS = (
    "precision", "seq len", "tokens/step", "micro-batch", "tokens/s", "ms/step", "+-", "MFU", "GiB", "W", "data", "graph"
)  # fmt: skip


def curriculum_speeds(sweeps: Sequence[Sweep], rates: Mapping[Shape, float]) -> list[dict[str, Any]]:
    """Tokens/s over all phases of every sweep whose cases all have a measured rate; restarts and validation not counted."""
    speeds = []
    for sweep in sweeps:
        if any(case.shape not in rates for case in sweep.cases):
            continue
        tokens = sum(case.phase.tokens for case in sweep.cases)
        seconds = sum(case.phase.tokens / rates[case.shape] for case in sweep.cases)
        speeds.append(
            {
                "precision": sweep.precision.name,
                "micro_batch_tokens": sweep.micro_batch_tokens,
                "tokens": tokens,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
        )
    return speeds


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """The JSON file, whole or not at all."""
    with disk_errors(path, "writing the benchmark's figures"):
        write_json_atomic(path, figures)


def write_chart(path: Path, figures: Mapping[str, Any]) -> None:
    """Tokens/s by length as PNG, where there is something to draw."""
    chart = bench_chart(figures["cases"], figures["device"])
    if chart is not None:
        with disk_errors(path, "writing the benchmark's chart"), atomic_file(path) as handle:
            handle.write(chart.png)


def show(path: Path, figures: Mapping[str, Any], curriculum: str) -> None:
    """Print the tables, the speed over the curriculum, and where the figures are."""
    console = table_console()
    console.print(_case_table(figures["cases"], figures["peak_bf16_flops_per_second"]))
    for speed in figures.get("curriculum", ()):
        console.print(
            f"curriculum {curriculum} in {speed['precision']}, micro-batches up to {speed['micro_batch_tokens']:,} tokens: "
            f"{speed['tokens_per_second']:,.0f} tokens/s over its {speed['tokens']:,} tokens, "
            f"{duration(speed['step_seconds'])} of steps",
            soft_wrap=True,
            markup=False,
        )
    for row in figures["cases"]:
        if row.get("kernels"):
            console.print(_kernel_table(row))
    console.print(f"written: {path} and .png", soft_wrap=True, markup=False)


def _case_table(rows: list[dict[str, Any]], peak: float | None) -> Table:
    stated = (
        f"MFU against {peak / 1e12:g} TFLOP/s (dense BF16)" if peak else "MFU: the device's peak is not in the table"
    )
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=f"medians; +- is the distance of the quartiles; {stated}"
    )
    for header in COLUMNS:
        table.add_column(header, justify="left" if header == "precision" else "right")
    for row in rows:
        shape = f"{row['micro_batch_size']:,} x {row['accumulation']}"
        cells = [row["precision"], str(row["seq_len"]), f"{row['tokens_per_step']:,}", shape]
        if "error" in row:
            table.add_row(*cells, row["error"].splitlines()[0])
            continue
        table.add_row(
            *cells,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_seconds_median'] * 1e3:,.1f}",
            f"{row['step_seconds_spread']:.1%}",
            f"{row['mfu']:.1%}" if row["mfu"] else "-",
            f"{row['peak_memory_bytes'] / GIB:.1f}" if row["peak_memory_bytes"] else "-",
            f"{row['power_watts']:.0f}" if row["power_watts"] else "-",
            f"{row['data_wait_share']:.1%}",
            "yes" if row["cuda_graph"] else "no",
        )
    return table


def _kernel_table(row: dict[str, Any]) -> Table:
    total = sum(kernel["seconds"] for kernel in row["kernels"])
    title = f"kernels of one step, {row['precision']}, seq_len {row['seq_len']}"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for header in ("share", "ms", "launches"):
        table.add_column(header, justify="right")
    table.add_column("kernel", no_wrap=True)
    for kernel in row["kernels"][:KERNELS_SHOWN]:
        seconds = kernel["seconds"]
        table.add_row(f"{seconds / total:.1%}", f"{seconds * 1e3:.2f}", str(kernel["launches"]), kernel["name"][:90])
    return table
