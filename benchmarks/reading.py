"""How fast the windows of a curriculum are read from a prepared corpus, on one core.

    python -m benchmarks.reading --data runs/demo/data
    python -m benchmarks.reading --made 1000000000 --in FOLDER --cold

Steps are read as training reads them (`PhaseBatches`), in this thread and without reading ahead, at each length, from the largest
source alone and from all sources in equal shares. Figures are millions of tokens per second of processor time, which a busy
machine disturbs least, and of wall time; medians of the rounds. The files are in the page cache after the first, unless `--cold`
closes them, drops them from it and opens them anew before every round. A round is then long enough for several stretches of
shuffled windows, because each stretch is asked for while the one before it is read.
`--made` makes a corpus of that many random tokens in documents of 600 and says how long opening it and the first step take and how much
memory a reader holds.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.corpus.indexed import IndexedTokens, IndexedWriter, bin_path
from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.config.data import DataConfig
from yxanul_nemo.data.source import ShuffledSource
from yxanul_nemo.data.windows import BatchLayout, PhaseBatches, PhaseWindows, Reading, open_sources

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MICRO_BATCH_TOKENS = 32_768
ACCUMULATION = 4
STEPS, COLD_STEPS = 20, 100
"""Steps of a round."""
MADE_DOCUMENT_TOKENS = 600
MADE_SHARD_DOCUMENTS = 200_000


def main(arguments: list[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--data", type=Path, metavar="DIR", help="a prepared corpus (data.dir)")
    corpus.add_argument("--made", type=int, metavar="TOKENS", help="make a corpus of that many tokens")
    parser.add_argument(
        "--in", dest="folder", type=Path, default=Path("runs/made"), help="where (default: %(default)s)"
    )
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every round")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: %(default)s)")
    for key in ("chunk_tokens", "shuffle_tokens"):
        default = DataConfig.model_fields[key].default
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.made:
        prefixes = {"made": _made_corpus(options.folder, options.made)}
    else:
        manifest = load_manifest(options.data)
        names = sorted(manifest.sources, key=lambda name: -manifest.sources[name].tokens("train"))
        prefixes = {name: manifest.prefixes(options.data, name, "train") for name in names}
    files = [bin_path(prefix) for of_source in prefixes.values() for prefix in of_source]
    if options.cold:
        _drop(files)
    began, memory = time.perf_counter(), _memory_bytes()
    sources = _open(prefixes, options.chunk_tokens)
    opened = time.perf_counter() - began
    _batches(sources, 2048, options.shuffle_tokens, 1).batch(0)
    first = time.perf_counter() - began - opened
    console = Console(width=120)
    console.print(
        f"{sum(s.tokens_per_epoch for s in sources):,} tokens in {len(files)} files opened in {opened:.2f} s, first step {first:.2f} s, "
        f"memory {(_memory_bytes() - memory) / 2**20:.0f} MiB beside the page cache"
    )
    del sources
    names = list(prefixes)
    table = Table()
    chosen = {names[0]: names[:1]} | ({f"{len(names)} sources": names} if len(names) > 1 else {})
    for column in ("seq_len", *(f"{name}, {unit}" for name in chosen for unit in ("M/s CPU", "M/s wall"))):
        table.add_column(column, justify="right")
    for seq_len in LENGTHS:
        cells = []
        for some in chosen.values():
            rates = _rates({name: prefixes[name] for name in some}, seq_len, options)
            cells += [f"{statistics.median(rate) / 1e6:.1f}" for rate in zip(*rates, strict=True)]
        table.add_row(str(seq_len), *cells)
    console.print(table)


def _rates(
    prefixes: Mapping[str, Sequence[Path]], seq_len: int, options: argparse.Namespace
) -> list[tuple[float, float]]:
    """Return tokens per second of processor time and of wall time, for each round."""
    if options.cold:
        rates = []
        for _ in range(options.rounds):
            _drop([bin_path(prefix) for of_source in prefixes.values() for prefix in of_source])
            batches = _batches(_open(prefixes, options.chunk_tokens), seq_len, options.shuffle_tokens, COLD_STEPS)
            rates.append(_tokens_per_second(batches, 0, COLD_STEPS))
            # A page that is mapped stays in the cache.
            del batches
        return rates
    batches = _batches(
        _open(prefixes, options.chunk_tokens), seq_len, options.shuffle_tokens, (options.rounds + 1) * STEPS
    )
    return [_tokens_per_second(batches, round_ * STEPS, STEPS) for round_ in range(options.rounds + 1)][1:]


def _open(prefixes: Mapping[str, Sequence[Path]], chunk_tokens: int) -> list[ShuffledSource]:
    shards = {name: [IndexedTokens(prefix) for prefix in of_source] for name, of_source in prefixes.items()}
    return open_sources(shards, 1, chunk_tokens)


def _batches(sources: Sequence[ShuffledSource], seq_len: int, shuffle_tokens: int, steps: int) -> PhaseBatches:
    layout = BatchLayout(MICRO_BATCH_TOKENS // seq_len, ACCUMULATION, data_parallel=1)
    reading = Reading(0, steps * layout.windows_per_step, np.full(len(sources), 1 / len(sources)))
    windows = PhaseWindows(sources, [0] * len(sources), seq_len, [reading], shuffle_tokens)
    return PhaseBatches(windows, layout, rank=0, first_step=0, last_step=steps)


def _made_corpus(folder: Path, tokens: int) -> list[Path]:
    """Write shards of random documents, unless they are there, and return their prefixes."""
    folder.mkdir(parents=True, exist_ok=True)
    random, prefixes = np.random.default_rng(0), []
    for number in range(-(-tokens // (MADE_DOCUMENT_TOKENS * MADE_SHARD_DOCUMENTS))):
        prefixes.append(folder / f"made-{number:05d}")
        if bin_path(prefixes[-1]).exists():
            continue
        with IndexedWriter(prefixes[-1], np.dtype(np.int32)) as writer:
            for _ in range(MADE_SHARD_DOCUMENTS // 1000):
                ids = random.integers(0, 200_000, (1000, MADE_DOCUMENT_TOKENS), dtype=np.int32)
                writer.add_documents(list(ids))
    return prefixes


def _drop(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _memory_bytes() -> int:
    """Return this process's memory without the files that it maps."""
    with open("/proc/self/statm", encoding="ascii") as handle:
        _, resident, shared, *_ = map(int, handle.read().split())
    return (resident - shared) * resource.getpagesize()


def _tokens_per_second(batches: PhaseBatches, first: int, steps: int) -> tuple[float, float]:
    """Return tokens per second of processor time and of wall time, over `steps` steps from step `first` on."""
    cpu, wall = time.thread_time(), time.perf_counter()
    tokens = sum(batches.batch(step)[0].numel() for step in range(first, first + steps))
    return tokens / (time.thread_time() - cpu), tokens / (time.perf_counter() - wall)


if __name__ == "__main__":
    main(sys.argv[1:])
