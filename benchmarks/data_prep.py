"""Speed of data preparation, end to end, beside the bare tokenizer and beside Megatron-LM's tool.

    python -m benchmarks.data_prep --input c4_validation_2k.parquet --copies 16 --tokenizer runs/RUN/tokenizer --workers 2 --rounds 5

Variants, each in a process of its own, taking turns so that a busy machine slows them alike:

- `prepare`: `data_prep` from parquet to .bin/.idx, split, hashes, fsync and manifest, start of worker processes included.
- `bare`: `tokenizers.Tokenizer.encode_batch_fast` on the same texts, already in memory, with as many threads; nothing is written.
- `preprocess_data`: what Megatron-LM's `tools/preprocess_data.py --append-eod --workers N` does, from JSON lines: a pool of processes
  that encode one document at a time with Megatron-core's own Hugging Face tokenizer, and its `IndexedDatasetBuilder`. The script is
  not in Megatron-core's package; `--megatron-lm FOLDER` runs the one of a checkout.

Imports, and loading the tokenizer in the first process, are not counted. Figures are medians over the rounds: megabytes (10^6 bytes of
UTF-8 text) per second of wall time, the same by round, and processor time of all processes together. With more than one copy the
input is the same text again in another order, so that later copies are encoded as in a long run, from a memory that knows most words.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

VARIANTS = ("prepare", "bare", "preprocess_data")
DOCUMENTS_PER_BATCH = 1000


class Clock:
    """Wall time and processor time of this process and of those it waited for, in seconds."""

    def __init__(self) -> None:
        self._start = self._now()

    def stop(self) -> dict[str, float]:
        """Time since the start."""
        wall, cpu = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return {"seconds": wall, "cpu_seconds": cpu}

    @staticmethod
    def _now() -> tuple[float, float]:
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(part.ru_utime + part.ru_stime for part in usage)


def texts_of(pattern: str) -> Iterator[str]:
    """All documents of the input."""
    from data_prep.corpus.find_shards import resolve_shards
    from data_prep.corpus.open_shard import open_shard

    for shard in resolve_shards(pattern, "--input"):
        with open_shard(shard) as reader:
            for batch in reader.batches():
                yield from batch.texts


def run_prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """This project, from parquet to a manifest."""
    from data_prep.corpus.preparation import prepare_corpus
    from data_prep.tokenizers.tokenizer import Tokenizer
    from yxanul_nemo.config.data import SourceConfig

    load = functools.partial(Tokenizer.load, options.tokenizer)
    tokenizer = load()
    expected = tokenizer.fingerprint  # Computed here: like loading, it is not part of the time.
    clock = Clock()
    sources = {"text": SourceConfig(path=options.input)}
    manifest = prepare_corpus(folder, sources, tokenizer, load, 0.0, options.workers)
    times = clock.stop()
    assert manifest.tokenizer_fingerprint == expected
    source = manifest.sources["text"]
    return times | {"bytes": source.text_bytes("train"), "tokens": source.tokens("train")}


def run_bare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The tokenizer library alone; `folder` stays empty."""
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.workers > 1 else "false"
    tokenizer = _library(options.tokenizer)
    texts = list(texts_of(options.input))
    tokens = 0
    clock = Clock()
    for first in range(0, len(texts), DOCUMENTS_PER_BATCH):
        batch = tokenizer.encode_batch_fast(texts[first : first + DOCUMENTS_PER_BATCH], add_special_tokens=False)
        tokens += sum(len(encoding) + 1 for encoding in batch)
    return clock.stop() | {"bytes": sum(len(text.encode()) for text in texts), "tokens": tokens}


def run_preprocess_data(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Megatron-LM's way, from JSON lines."""
    lines = folder / "input.jsonl"
    size = 0
    with open(lines, "w", encoding="utf-8") as handle:
        for text in texts_of(options.input):
            size += len(text.encode())
            handle.write(json.dumps({"text": text}) + "\n")
    if options.megatron_lm is not None:
        return _megatron_lm(options, folder, lines) | {"bytes": size}
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocab_size = _megatron_tokenizer(options.tokenizer).vocab_size
    clock = Clock()
    pool = multiprocessing.get_context("fork").Pool(options.workers, _start_encoder, (options.tokenizer,))
    builder = IndexedDatasetBuilder(str(folder / "out.bin"), dtype=DType.optimal_dtype(vocab_size))
    tokens = 0
    with open(lines, encoding="utf-8") as handle:
        for ids, lengths in pool.imap(_encode_line, handle, 32):
            builder.add_document(ids, lengths)
            tokens += len(ids)
    builder.finalize(str(folder / "out.idx"))
    pool.close()
    pool.join()
    return clock.stop() | {"bytes": size, "tokens": tokens}


def _megatron_lm(options: argparse.Namespace, folder: Path, lines: Path) -> dict[str, Any]:
    """Megatron-LM's own script, with its start included as a user has to wait for it."""
    from data_prep.corpus.indexed import IndexedTokens

    command = [sys.executable, options.megatron_lm / "tools" / "preprocess_data.py", "--input", lines, "--append-eod"]
    command += ["--output-prefix", folder / "out", "--tokenizer-type", "HuggingFaceTokenizer"]
    command += ["--tokenizer-model", options.tokenizer, "--workers", str(options.workers)]
    environment = {**os.environ, "PYTHONPATH": str(options.megatron_lm)}
    clock = Clock()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return clock.stop() | {"tokens": len(IndexedTokens(folder / "out_text_document").tokens)}


def _library(folder: Path) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _megatron_tokenizer(folder: Path) -> Any:
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(tokenizer_path=str(folder), metadata_path={"library": "huggingface"})


encoder: Any
"""Megatron's tokenizer, in a worker of `multiprocessing.Pool`."""


def _start_encoder(folder: Path) -> None:
    global encoder  # The way of multiprocessing.Pool to keep a value in a worker.
    encoder = _megatron_tokenizer(folder)


def _encode_line(line: str) -> tuple[list[int], list[int]]:
    ids = list(encoder.tokenize(json.loads(line)["text"]))
    ids.append(encoder.eod)
    return ids, [len(ids)]


RUN: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "prepare": run_prepare,
    "bare": run_bare,
    "preprocess_data": run_preprocess_data,
}


def _write_copies(pattern: str, copies: int, folder: Path) -> None:
    """One shard for each copy, its texts in an order of its own."""
    texts = list(texts_of(pattern))
    for copy in range(copies):
        random.Random(copy).shuffle(texts)
        pq.write_table(pa.table({"text": texts}), folder / f"copy-{copy:03}.parquet")


def measure(arguments: list[str], variant: str) -> dict[str, Any]:
    """Run one variant in a new process."""
    command = [sys.executable, "-m", "benchmarks.data_prep", *arguments, "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    """Measure all variants in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", required=True, metavar="PATH", help="shards with a `text` column: folder, glob or file"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--copies", type=int, default=1, help="how often the input is taken (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="cores for each variant (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants to measure")
    parser.add_argument("--megatron-lm", type=Path, metavar="FOLDER", help="a checkout of Megatron-LM to run instead")
    parser.add_argument("--variant", choices=VARIANTS, help="run only this one, once, and print its figures as JSON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.variant is not None:
        with tempfile.TemporaryDirectory() as folder:
            result = RUN[options.variant](options, Path(folder))
        print(json.dumps(result))
        return
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in options.only}
    with tempfile.TemporaryDirectory() as folder:
        _write_copies(options.input, options.copies, Path(folder))
        for _ in range(options.rounds):
            for variant in options.only:
                results[variant].append(measure([*arguments, "--input", folder], variant))
    counts = {(result["bytes"], result["tokens"]) for rounds in results.values() for result in rounds}
    if len(counts) != 1:
        raise RuntimeError(f"the variants disagree on (bytes, tokens): {sorted(counts)}")
    size, tokens = counts.pop()
    table = Table(
        title=f"{size / 1e6:.1f} MB, {tokens:,} tokens, {options.workers} workers, load {os.getloadavg()[1]:.1f}"
    )
    for column in ("variant", "MB/s", "tokens/s", "time against\nprepare", "MB/s of all rounds", "CPU seconds"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    ours = results.get("prepare", [])
    for variant, rounds in results.items():
        seconds = statistics.median(result["seconds"] for result in rounds)
        ratios = [other["seconds"] / one["seconds"] for one, other in zip(ours, rounds, strict=False)]
        table.add_row(
            variant,
            f"{size / 1e6 / seconds:.2f}",
            f"{tokens / seconds:,.0f}",
            f"{statistics.median(ratios):.2f}" if ratios and variant != "prepare" else "",
            " ".join(f"{size / 1e6 / result['seconds']:.2f}" for result in rounds),
            f"{statistics.median(result['cpu_seconds'] for result in rounds):.2f}",
        )
    Console(width=120).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"workers": options.workers, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
