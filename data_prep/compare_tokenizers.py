"""Compare tokenizers on the same text: `stage=compare_tokenizers`, or `python -m data_prep.compare_tokenizers --help`."""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data_prep.corpus.demo_corpus import write_demo_corpus
from data_prep.corpus.encode import is_heldout
from data_prep.corpus.find_shards import resolve_shards
from data_prep.corpus.open_shard import open_shard
from data_prep.prepare import training_texts
from data_prep.tokenizers.superbpe import build_superbpe
from data_prep.tokenizers.tokenizer import Tokenizer, build_tokenizer, named_specials
from yxanul_nemo.config.data import SourceConfig, TokenizerConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import configure_logging, logger
from yxanul_nemo.run_folder import TOKENIZER_RECORD
from yxanul_nemo.streams import outlive_reader

CONTROL = "plain BPE (control)"
BATCH_BYTES = 2_000_000
"""Text given to a tokenizer at once."""


@dataclass(frozen=True)
class TokenizerFigures:
    """One tokenizer on one text."""

    name: str
    vocab_size: int
    fingerprint: str
    documents: int
    characters: int
    bytes: int
    tokens: int
    changed_documents: int
    """Documents that do not come back unchanged from their ids."""
    encode_bytes_per_second: float
    """Median over passes through the text, with the threads that the library takes."""

    @property
    def chars_per_token(self) -> float:
        return self.characters / self.tokens

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def compare_tokenizers(
    tokenizers: Mapping[str, Tokenizer], texts: Sequence[str], passes: int = 3
) -> list[TokenizerFigures]:
    """Figures of each tokenizer on `texts`. Passes for speed take turns, so that a busy machine is as busy for one as for another."""
    if not any(texts):
        raise UserError("--input", "holds no text", "at least one document that is not empty")
    batches = list(_batches(texts))
    total_bytes = sum(len(text.encode()) for text in texts)
    seconds: dict[str, list[float]] = {name: [] for name in tokenizers}
    for _ in range(passes):
        for name, tokenizer in tokenizers.items():
            start = time.perf_counter()
            for batch in batches:
                tokenizer.encode_batch(batch)
            seconds[name].append(time.perf_counter() - start)
    figures = []
    for name, tokenizer in tokenizers.items():
        tokens = changed = 0
        for batch in batches:
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                tokens += len(ids)
                changed += tokenizer.decode(ids) != text
        figures.append(
            TokenizerFigures(
                name=name,
                vocab_size=tokenizer.vocab_size,
                fingerprint=tokenizer.fingerprint,
                documents=len(texts),
                characters=sum(map(len, texts)),
                bytes=total_bytes,
                tokens=tokens,
                changed_documents=changed,
                encode_bytes_per_second=total_bytes / statistics.median(seconds[name]),
            )
        )
    return figures


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def print_figures(figures: Sequence[TokenizerFigures], console: Console) -> None:
    """A table with bars of chars/token; tokens are compared with those of the control if it is there, else of the first."""
    base = next((one for one in figures if one.name == CONTROL), figures[0])
    longest = max(one.chars_per_token for one in figures)
    first = figures[0]
    table = Table(
        title=f"{first.documents:,} documents, {first.characters:,} characters, {first.bytes:,} bytes; tokens against {base.name}",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("tokenizer")
    for heading in ("ids", "tokens", "against", "chars/\ntoken"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for heading in ("bytes/\ntoken", "encode\nMB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in figures:
        table.add_row(
            one.name,
            f"{one.vocab_size:,}",
            f"{one.tokens:,}",
            "" if one is base else f"{one.tokens / base.tokens - 1:+.1%}",
            f"{one.chars_per_token:.3f}",
            Bar(longest, 0, one.chars_per_token, width=10),
            f"{one.bytes_per_token:.3f}",
            f"{one.encode_bytes_per_second / 1e6:.2f}",
        )
    console.print(table)
    for one in figures:
        if one.changed_documents:
            console.print(f"{one.name}: {one.changed_documents:,} documents do not come back unchanged from their ids")


def write_figures(figures: Sequence[TokenizerFigures], folder: Path) -> None:
    """Write comparison.json and, where matplotlib is installed, comparison.png."""
    entries = [
        asdict(one) | {"chars_per_token": one.chars_per_token, "bytes_per_token": one.bytes_per_token}
        for one in figures
    ]
    write_json_atomic(folder / "comparison.json", {"tokenizers": entries})
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("matplotlib is not installed: comparison.png is left out")
        return
    _plot(figures, folder / "comparison.png")


def _plot(figures: Sequence[TokenizerFigures], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 1.2 + 0.4 * len(figures)), layout="constrained")
    FigureCanvasAgg(picture)
    compression, speed = picture.subplots(1, 2, sharey=True)
    places = np.arange(len(figures))
    compression.barh(places, [one.chars_per_token for one in figures])
    compression.set_yticks(places, [one.name for one in figures])
    compression.set_xlabel("characters per token")
    compression.invert_yaxis()
    speed.barh(places, [one.encode_bytes_per_second / 1e6 for one in figures], color="tab:orange")
    speed.set_xlabel("encoding, MB/s")
    picture.savefig(path, dpi=120)


def run_compare_stage(config: RunConfig) -> list[TokenizerFigures]:
    """The run's tokenizer on the held-out text of its sources, beside plain BPE of the same size trained on its training text.

    Writes `run.dir/tokenizer_comparison/`. UserError if `stage=data` has not made the tokenizer yet or nothing is held out.
    """
    folder = config.run.folder.tokenizer
    if not (folder / TOKENIZER_RECORD).exists():
        raise UserError(folder, "has no tokenizer yet", "the tokenizer of this run", "Make it with stage=data.")
    sources = config.corpus_sources
    if config.data.demo_corpus:
        sources = write_demo_corpus(config.data_dir / "corpus", config.data.demo_bytes)
    fraction = config.data.heldout_fraction
    texts = _first(_heldout(sources, fraction), config.tokenizer.train_bytes)
    if not texts:
        raise UserError("data.heldout_fraction", f"{fraction} leaves no text to compare on", "held-out documents")
    tokenizer = Tokenizer.load(folder)
    control = build_tokenizer(
        TokenizerConfig(
            name=CONTROL, kind="train_bpe", vocab_size=tokenizer.vocab_size, train_bytes=config.tokenizer.train_bytes
        ),
        config.run.folder.tokenizer_comparison / "control",
        training_texts(sources, fraction, config.tokenizer.train_bytes),
    )
    figures = compare_tokenizers({config.tokenizer.name: tokenizer, CONTROL: control}, texts)
    print_figures(figures, Console())
    write_figures(figures, config.run.folder.tokenizer_comparison)
    return figures


def _heldout(sources: Mapping[str, SourceConfig], fraction: float) -> Iterator[str]:
    """Held-out documents of the sources that have text."""
    for name, source in sources.items():
        if source.ids_column is not None:
            continue
        for shard in resolve_shards(source.files, f"data.sources.{name}.path"):
            with open_shard(shard, source.text_column) as reader:
                for batch in reader.batches():
                    for text, raw in zip(batch.texts, batch.raw_texts, strict=True):
                        if is_heldout(raw, fraction):
                            yield text


def _first(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Documents until they come to `max_bytes`."""
    taken: list[str] = []
    size = 0
    for text in texts:
        if size >= max_bytes:
            break
        taken.append(text)
        size += len(text.encode())
    return taken


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a folder or .model file, or from the vocab.json and merges.txt of a SuperBPE folder."""
    if (path / "vocab.json").exists() and (path / "merges.txt").exists() and not (path / "tokenizer.json").exists():
        named = named_specials(path)
        if "eos_token" not in named:
            raise UserError(path, "does not say which token ends a document", "eos_token in tokenizer_config.json")
        return Tokenizer.wrap(build_superbpe(path), named["eos_token"], named.get("pad_token"), path)
    return Tokenizer.load(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the tool; returns the exit code."""
    options = _options(arguments)
    configure_logging()
    try:
        texts = _first(_documents(options.input, options.text_column), options.max_bytes)
        tokenizers: dict[str, Tokenizer] = {}
        for entry in options.tokenizer:
            name, path = entry.split("=", 1) if "=" in entry else (Path(entry).name, entry)
            if name in tokenizers or name == CONTROL:
                raise UserError("--tokenizer", f"'{name}' is there twice", "distinct names, as NAME=PATH")
            tokenizers[name] = open_tokenizer(Path(path))
        if options.control:
            tokenizers[CONTROL] = open_tokenizer(options.control)
        figures = compare_tokenizers(tokenizers, texts, options.passes)
        print_figures(figures, Console())
        if options.output is not None:
            write_figures(figures, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _documents(inputs: Sequence[str], text_column: str) -> Iterator[str]:
    for path in inputs:
        for shard in resolve_shards(path, "--input"):
            with open_shard(shard, text_column) as reader:
                for batch in reader.batches():
                    yield from batch.texts


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.compare_tokenizers",
        description="Characters, bytes and tokens of text in several tokenizers, and how fast they encode it.",
        epilog="A control: python -m data_prep.train_superbpe --plain --vocab-size V --input TRAINING.parquet --output DIR",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="folders, globs in quotes, or files")
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="column with the text (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help="folders with tokenizer.json or with SuperBPE's vocab.json and merges.txt, or .model files",
    )
    parser.add_argument(
        "--control", type=Path, metavar="PATH", help="plain BPE to compare with (default: the first tokenizer)"
    )
    parser.add_argument(
        "--max-bytes",
        type=lambda value: int(float(value)),
        default=20_000_000,
        metavar="N",
        help="text to use, in bytes of UTF-8, from the start (default: %(default)s)",
    )
    parser.add_argument("--passes", type=int, default=3, metavar="N", help="passes timed, of which the median counts")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for comparison.json and comparison.png")
    options = parser.parse_args(arguments)
    if options.passes < 1:
        parser.error(f"--passes must be at least 1, got {options.passes}")
    return options


if __name__ == "__main__":
    outlive_reader()
    sys.exit(main())
