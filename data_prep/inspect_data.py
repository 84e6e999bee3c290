"""Look into a prepared corpus: counts, lengths of documents, the share of each source, and samples as text."""

import argparse
import sys
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import CorpusManifest, Split, load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.streams import outlive_reader

BAR_WIDTH = 40
SAMPLE_CHARS = 400


def inspect(config: RunConfig, samples: int = 2) -> None:
    """Print what the run's prepared corpus holds. Raises UserError if it is not prepared yet."""
    manifest = load_manifest(config.data_dir)
    tokenizer, console = Tokenizer.load(config.run.folder.tokenizer), Console()
    show(manifest, config.data_dir, tokenizer, samples, console)
    if config.data.document_mask:
        seq_len = max(phase.seq_len for phase in config.curriculum.phases)
        for name in manifest.sources:
            seen = mean_seen_tokens(document_lengths(manifest, config.data_dir, name, "train"), seq_len)
            console.print(
                f"{name}: inside its document (data.document_mask) a token sees {seen:,.0f} tokens of a window of {seq_len:,} on average, "
                f"without {(seq_len + 1) / 2:,.0f}",
                soft_wrap=True,
            )


def show(manifest: CorpusManifest, data_dir: Path, tokenizer: Tokenizer, samples: int, console: Console) -> None:
    """Print a corpus. Raises UserError if the tokenizer is not the one it was made with."""
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            data_dir,
            f"was made with the tokenizer {manifest.tokenizer_fingerprint[:12]}..., not {tokenizer.fingerprint[:12]}...",
            "the corpus and the tokenizer of one run",
        )
    console.print(_counts(manifest))
    console.print(f"fingerprint {manifest.fingerprint}\n", soft_wrap=True)
    for name in manifest.sources:
        console.print(_histogram(name, document_lengths(manifest, data_dir, name, "train")))
        for number, text in enumerate(sample_texts(manifest, data_dir, name, tokenizer, samples), start=1):
            console.print(f"[bold]{name}, sample {number}[/bold]")
            console.print(Text(text), soft_wrap=True)
            console.print()


def _counts(manifest: CorpusManifest) -> Table:
    title = f"{manifest.vocab_size:,} ids as {manifest.dtype}; {manifest.heldout_fraction:g} of documents held out"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 0))
    table.add_column("source", overflow="fold")
    for column in (
        "shards",
        "documents",
        "tokens",
        "share",
        "bytes/\ntoken",
        "held-out\ndocuments",
        "held-out\ntokens",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("skipped\nrows", justify="right")
    total = sum(source.tokens("train") for source in manifest.sources.values())
    for name, source in manifest.sources.items():
        skipped = sum(entry.skipped.total() for entry in source.inputs)
        table.add_row(
            name,
            f"{len(source.inputs):,}",
            f"{source.documents('train'):,}",
            f"{source.tokens('train'):,}",
            f"{source.tokens('train') / total:.1%}",
            f"{source.text_bytes('train') / source.tokens('train'):.2f}",
            f"{source.documents('heldout'):,}",
            f"{source.tokens('heldout'):,}",
            f"{skipped:,}",
        )
    return table


def document_lengths(manifest: CorpusManifest, data_dir: Path, source: str, split: Split) -> np.ndarray:
    """[documents] lengths in tokens, EOS included."""
    shards = [IndexedTokens(prefix) for prefix in manifest.prefixes(data_dir, source, split)]
    return np.concatenate([np.empty(0, np.int64), *(np.diff(shard.document_offsets) for shard in shards)])


def mean_seen_tokens(lengths: np.ndarray, seq_len: int) -> float:
    """Tokens that a token attends to, itself included, where attention stays inside documents that windows are cut of in this order."""
    total = int(lengths.sum())
    ends = np.union1d(np.cumsum(lengths), np.arange(seq_len, total, seq_len))
    pieces = np.diff(ends, prepend=0).astype(np.float64)
    return float((pieces * (pieces + 1) / 2).sum() / total)


def length_bins(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, documents) for lengths from a power of two up to below the next, the empty ends left out."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    counts = np.bincount(exponents)
    return [(2**i, 2 ** (i + 1), int(counts[i])) for i in range(int(exponents.min()), len(counts))]


def _histogram(name: str, lengths: np.ndarray) -> Table:
    middle = f"mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}, longest {lengths.max():,}"
    table = Table(title=f"{name}: tokens per document ({middle})", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    bins = length_bins(lengths)
    most = max(count for _, _, count in bins)
    for first, end, count in bins:
        table.add_row(f"{first:,} to {end - 1:,}", "█" * round(BAR_WIDTH * count / most), f"{count / len(lengths):.1%}")
    return table


def sample_texts(manifest: CorpusManifest, data_dir: Path, source: str, tokenizer: Tokenizer, count: int) -> list[str]:
    """Beginnings of `count` training documents, spread evenly over the source."""
    shards = [IndexedTokens(prefix) for prefix in manifest.prefixes(data_dir, source, "train")]
    first = np.cumsum([0, *(len(shard) for shard in shards)])
    texts = []
    for position in np.linspace(0, first[-1] - 1, count + 2).astype(int)[1:-1]:
        shard = int(np.searchsorted(first, position, side="right")) - 1
        # No token is shorter than a byte, so this many are enough.
        ids = shards[shard].document(int(position - first[shard]))[: 4 * SAMPLE_CHARS]
        text = tokenizer.decode(ids)
        texts.append(text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " [...]")
    return texts


def main(arguments: list[str] | None = None) -> int:
    """Command line of the tool; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect_data", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with manifest.json")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FOLDER", help="the tokenizer it was made with"
    )
    parser.add_argument(
        "--eos-token", metavar="TOKEN", help="token that ends a document (default: as the tokenizer says)"
    )
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="texts per source (default: %(default)s)")
    parser.add_argument("--source", metavar="NAME", help="only this source")
    options = parser.parse_args(arguments)
    try:
        manifest = load_manifest(options.data)
        if options.source is not None:
            if options.source not in manifest.sources:
                raise UserError(
                    "--source", f"no source '{options.source}'", fix=nearest(options.source, manifest.sources)
                )
            manifest = manifest.model_copy(update={"sources": {options.source: manifest.sources[options.source]}})
        show(manifest, options.data, Tokenizer.load(options.tokenizer, options.eos_token), options.samples, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    outlive_reader()
    sys.exit(main())
