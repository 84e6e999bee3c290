"""How fast the windows of a curriculum are read from a prepared corpus, on one core.

    python -m benchmarks.reading --data runs/demo/data

Steps are read as training reads them (`PhaseBatches`), in this thread and without reading ahead, at each length, from the largest
source alone and from all sources in equal shares. Figures are millions of tokens per second of processor time, which a busy
machine disturbs least, and of wall time; medians of the rounds. The files are in the page cache after the first.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.data.windows import BatchLayout, PhaseBatches, PhaseWindows, open_streams

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MICRO_BATCH_TOKENS = 32_768
ACCUMULATION = 4
STEPS = 20


def main(arguments: list[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a prepared corpus (data.dir)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    manifest = load_manifest(options.data)
    names = sorted(manifest.sources, key=lambda name: -manifest.sources[name].tokens("train"))
    shards = {
        name: [IndexedTokens(prefix) for prefix in manifest.prefixes(options.data, name, "train")] for name in names
    }
    streams = open_streams(shards, seed=1)
    mean = ", ".join(
        f"{name} ({stream.tokens_per_epoch:,} tokens, {stream.lengths.mean():.0f} per document)"
        for name, stream in zip(names, streams, strict=True)
    )
    table = Table(title=mean)
    blends = {names[0]: streams[:1], f"{len(names)} sources": streams}
    for column in ("seq_len", *(f"{name}, {unit}" for name in blends for unit in ("M/s CPU", "M/s wall"))):
        table.add_column(column, justify="right")
    for seq_len in LENGTHS:
        cells = []
        for chosen in blends.values():
            windows = PhaseWindows(chosen, np.full(len(chosen), 1 / len(chosen)), [0] * len(chosen), seq_len)
            layout = BatchLayout(MICRO_BATCH_TOKENS // seq_len, ACCUMULATION, data_parallel=1)
            batches = PhaseBatches(windows, layout, rank=0, first_step=0, last_step=(options.rounds + 1) * STEPS)
            rates = [_tokens_per_second(batches, round_ * STEPS) for round_ in range(options.rounds + 1)][1:]
            cells += [f"{statistics.median(rate) / 1e6:.1f}" for rate in zip(*rates, strict=True)]
        table.add_row(str(seq_len), *cells)
    Console(width=120).print(table)


def _tokens_per_second(batches: PhaseBatches, first: int) -> tuple[float, float]:
    """Tokens per second of processor time and of wall time, over STEPS steps."""
    cpu, wall = time.thread_time(), time.perf_counter()
    tokens = sum(batches.batch(step)[0].numel() for step in range(first, first + STEPS))
    return tokens / (time.thread_time() - cpu), tokens / (time.perf_counter() - wall)


if __name__ == "__main__":
    main(sys.argv[1:])
