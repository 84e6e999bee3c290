"""`stage=bench`: time every case, show a table, and keep the figures in `run.dir/bench/`.

Several processes take part if torchrun starts them: `torchrun --nproc-per-node=2 launcher.py stage=bench`.
"""

import logging
import sys
import time
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_prep.manifest import MANIFEST_NAME, load_manifest
from yxanul_nemo.bench.cases import Case, bench_cases
from yxanul_nemo.bench.chart import bench_chart
from yxanul_nemo.bench.measure import measure
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.data.windows import PhaseWindows, corpus_streams
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import atomic_file, write_json_atomic
from yxanul_nemo.launch.environment import describe_environment
from yxanul_nemo.log import logger
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.model.memory import GIB, MEASURED_VOCAB_SIZE, with_micro_batch
from yxanul_nemo.runtime import formats_of, rank_and_processes, resolve_device
from yxanul_nemo.training.micro_batch import gpu_memory_bytes
from yxanul_nemo.training.phases import source_sizes
from yxanul_nemo.training.records import peak_flops_per_second

KERNELS_SHOWN = 20
RANDOM_DOCUMENT_TOKENS = 588
"""Mean length of a document of random tokens: that of the documentation corpus in BENCHMARKS.md, in tokens of the 200,005."""
COLUMNS = (
    "precision", "seq len", "tokens/step", "micro-batch", "tokens/s", "ms/step", "+-", "MFU", "GiB", "W", "data", "graph"
)  # fmt: skip
FILE_WIDTH = 150
"""Columns of a table where it does not go to a terminal."""


def run_bench_stage(config: RunConfig) -> bool:
    """Measure all cases; False if one of them could not run."""
    device = resolve_device(config.parallel)
    corpus = Corpus(config)
    config = with_micro_batch(config, corpus.vocab_size, gpu_memory_bytes(device))
    rank, processes = rank_and_processes()
    if rank:
        logger.setLevel(logging.WARNING)
    model_ranks = config.parallel.tensor_parallel * config.parallel.context_parallel
    formats = formats_of(config.precision, config.parallel, device)
    cases = bench_cases(config, formats, max(1, processes // model_ranks))
    over = "inside documents" if config.data.document_mask else "over whole windows"
    on = f"{processes} x {_device_name(device)}"
    logger.info("%d cases on %s, attention %s, data: %s", len(cases), on, over, corpus.description)
    peak = peak_flops_per_second(PrecisionConfig(name="bf16"), device, devices=processes)
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows.append(_describe(case) | _run(config, case, corpus, device, peak))
        _log(case, rows[-1])
    if rank == 0:
        _keep(config, corpus, device, processes, peak, rows)
    return all("error" not in row for row in rows)


def _keep(
    config: RunConfig, corpus: "Corpus", device: str, processes: int, peak: float | None, rows: list[dict[str, Any]]
) -> None:
    """Write and show the figures."""
    path = config.run.dir / "bench" / time.strftime("bench-%Y%m%d-%H%M%S.json")
    report = {
        "environment": describe_environment(),
        "device": _device_name(device),
        "processes": processes,
        "parallel": config.parallel.model_dump(),
        "peak_bf16_flops_per_second": peak,
        "model": config.model.name,
        "vocab_size": corpus.vocab_size,
        "data": corpus.description,
        "document_mask": config.data.document_mask,
        "timed_steps": config.bench.steps,
        "cases": rows,
    }
    with disk_errors(path, "writing the benchmark's figures"):
        write_json_atomic(path, report)
        if (chart := bench_chart(rows, _device_name(device))) is not None:
            with atomic_file(path.with_suffix(".png")) as handle:
                handle.write(chart.png)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    console.print(_table(rows, peak))
    for row in rows:
        if row.get("kernels"):
            console.print(_kernel_table(row))
    console.print(f"written: {path} and .png", soft_wrap=True, markup=False)


class Corpus:
    """Where the steps' tokens come from: the run's prepared corpus, or random ones where there is none."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.vocab_size = MEASURED_VOCAB_SIZE if config.tokenizer.vocab_size is None else config.tokenizer.vocab_size
        self.eos_id = 0
        self.description = (
            f"random tokens of {self.vocab_size:,} in documents of {RANDOM_DOCUMENT_TOKENS} on average (no corpus is prepared in "
            f"{config.data_dir})"
        )
        self._streams: list[Any] = [RandomTokens(self.vocab_size, self.eos_id, config.data.seed)]
        self._shares = np.ones(1)
        if (config.data_dir / MANIFEST_NAME).is_file():
            manifest = load_manifest(config.data_dir)
            names = config.data.source_names
            sizes = source_sizes(config, manifest)
            self._streams = corpus_streams(config, manifest)
            self._shares = normalized_shares(names, config.curriculum.blend, sizes)
            self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
            self.description = f"the corpus in {config.data_dir}"

    def windows(self, seq_len: int) -> PhaseWindows:
        """Windows from the beginning of each source."""
        return PhaseWindows(self._streams, self._shares, [0] * len(self._streams), seq_len)


class RandomTokens:
    """A stream of uniform random tokens with EOS as often as documents end, in the shape of `data.stream.TokenStream`."""

    def __init__(self, vocab_size: int, eos_id: int, seed: int):
        self.vocab_size, self.eos_id, self._random = vocab_size, eos_id, np.random.default_rng(seed)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens; `start` is of no consequence."""
        tokens = self._random.integers(0, self.vocab_size, count)
        tokens[self._random.random(count) < 1 / RANDOM_DOCUMENT_TOKENS] = self.eos_id
        return tokens


def _run(config: RunConfig, case: Case, corpus: Corpus, device: str, peak: float | None) -> dict[str, Any]:
    try:
        result = measure(config, case, corpus.windows(case.phase.seq_len), corpus.vocab_size, corpus.eos_id, device)
    except UserError as error:
        return {"error": str(error)}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    rate = case.phase.tokens_per_step / result.median_seconds
    flops = training_flops_per_token(config.model, corpus.vocab_size, case.phase.seq_len)
    return {
        "tokens_per_second": rate,
        "step_seconds_median": result.median_seconds,
        "step_seconds_spread": result.spread,
        "model_flops_per_second": rate * flops,
        "mfu": rate * flops / peak if peak else None,
        "peak_memory_bytes": result.peak_memory_bytes,
        "power_watts": result.power_watts,
        "data_wait_share": result.data_wait_share,
        "setup_seconds": result.setup_seconds,
        "cuda_graph": result.uses_graph,
        "loss_nats_per_token": result.loss_nats_per_token,
        "kernels": result.kernels and [{"name": n, "seconds": s, "launches": c} for n, s, c in result.kernels],
    }


def _describe(case: Case) -> dict[str, Any]:
    return {
        "precision": case.precision.name,
        "seq_len": case.phase.seq_len,
        "tokens_per_step": case.phase.tokens_per_step,
        "micro_batch_size": case.micro_batch_size,
        "accumulation": case.accumulation,
    }


def _log(case: Case, row: dict[str, Any]) -> None:
    if "error" in row:
        logger.info("%s: %s", case.name, row["error"])
    else:
        logger.info("%s: %s tokens/s", case.name, f"{row['tokens_per_second']:,.0f}")


def _table(rows: list[dict[str, Any]], peak: float | None) -> Table:
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
    for header, justify in (("share", "right"), ("ms", "right"), ("launches", "right"), ("kernel", "left")):
        table.add_column(header, justify=justify, no_wrap=header == "kernel")
    for kernel in row["kernels"][:KERNELS_SHOWN]:
        seconds = kernel["seconds"]
        table.add_row(f"{seconds / total:.1%}", f"{seconds * 1e3:.2f}", str(kernel["launches"]), kernel["name"][:90])
    return table


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
