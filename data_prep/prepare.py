"""The data stage: corpus, tokenizer, tokens; and the same as a tool of its own (`python -m data_prep.prepare --help`)."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from data_prep.corpus.demo_corpus import write_demo_corpus
from data_prep.corpus.encode import is_heldout
from data_prep.corpus.find_shards import resolve_shards
from data_prep.corpus.manifest import MANIFEST_NAME, CorpusManifest, load_manifest
from data_prep.corpus.open_shard import open_shard
from data_prep.corpus.preparation import prepare_corpus
from data_prep.tokenizers.tokenizer import Tokenizer, build_tokenizer
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import configure_logging, logger
from yxanul_nemo.streams import outlive_reader


def run_data_stage(config: RunConfig) -> CorpusManifest:
    """Make whatever is missing of the run's corpus, tokenizer and tokens; repeating it costs next to nothing.

    Raises UserError for inputs that cannot be used or that differ from those of the work already done.
    """
    data_dir = config.data_dir
    sources = config.corpus_sources
    if config.data.demo_corpus:
        sources = write_demo_corpus(data_dir / "corpus", config.data.demo_bytes)
    folder = config.run.folder.tokenizer
    texts = training_texts(sources, config.data.heldout_fraction, config.tokenizer.train_bytes)
    tokenizer = build_tokenizer(config.tokenizer, folder, texts)
    manifest = prepare_corpus(
        data_dir,
        sources,
        tokenizer,
        functools.partial(Tokenizer.load, folder),
        config.data.heldout_fraction,
        config.data.workers,
    )
    for line in describe(manifest):
        logger.info("%s", line)
    return manifest


def training_texts(
    sources: Mapping[str, SourceConfig], heldout_fraction: float, limit_bytes: int
) -> Callable[[], Iterator[str]]:
    """A function that streams text for training a tokenizer: the train split only, the sources in equal shares of bytes
    until they end, `limit_bytes` of UTF-8 in all. Sources of token ids have no text and are left out.

    The stream raises UserError if no source has text.
    """

    def stream() -> Iterator[str]:
        documents = {
            name: _train_documents(name, source, heldout_fraction)
            for name, source in sources.items()
            if source.ids_column is None
        }
        if not documents:
            raise UserError("data.sources", "hold only token ids", "a source with text, to train the tokenizer on")
        given = dict.fromkeys(documents, 0)
        total = 0
        while documents and total < limit_bytes:
            name = min(documents, key=given.__getitem__)
            document = next(documents[name], None)
            if document is None:
                del documents[name]
                continue
            text, size = document
            given[name] += size
            total += size
            yield text

    return stream


def _train_documents(name: str, source: SourceConfig, heldout_fraction: float) -> Iterator[tuple[str, int]]:
    """Text and size in bytes of a source's documents, held-out ones left out."""
    for shard in resolve_shards(source.files, f"data.sources.{name}.path"):
        with open_shard(shard, source.text_column) as reader:
            for batch in reader.batches():
                for text, raw in zip(batch.texts, batch.raw_texts, strict=True):
                    if not is_heldout(raw, heldout_fraction):
                        yield text, len(raw)


def describe(manifest: CorpusManifest) -> list[str]:
    """One line for each source."""
    lines = []
    for name, source in manifest.sources.items():
        tokens = source.tokens("train") + source.tokens("heldout")
        text_bytes = source.text_bytes("train") + source.text_bytes("heldout")
        lines.append(
            f"{name}: {len(source.inputs)} shards, {source.documents('train'):,} documents and {source.tokens('train'):,} tokens to "
            f"train on, {source.documents('heldout'):,} and {source.tokens('heldout'):,} held out, "
            f"{text_bytes / tokens:.2f} bytes/token, {source.skipped_rows()}"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line of the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.prepare",
        description="Tokenize parquet, JSON lines or text files into Megatron's .bin/.idx files, a pair for each shard and split, "
        "with a manifest. "
        "Run it again after a crash: it does only what is missing.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the tokens and manifest.json"
    )
    parser.add_argument("--input", metavar="PATH", help="folder, a glob in quotes, or one file")
    parser.add_argument("--source", default="text", metavar="NAME", help="name of the source (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="folder with tokenizer.json, or a .model file")
    parser.add_argument(
        "--eos-token", metavar="TOKEN", help="token that ends a document (default: as the tokenizer says)"
    )
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="column with the text (default: %(default)s)"
    )
    parser.add_argument("--ids-column", metavar="NAME", help="column with token ids (list<int>) to use instead of text")
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="share of documents held out (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="cores to use; 0: all (default)")
    parser.add_argument(
        "--verify", action="store_true", help="re-check a finished set by SHA-256, after preparing if --input is given"
    )
    options = parser.parse_args(arguments)
    configure_logging()
    try:
        if options.input is not None:
            if options.tokenizer is None:
                parser.error("--input needs --tokenizer")
            if not 0 <= options.heldout_fraction < 0.5:
                parser.error(f"--heldout-fraction must be at least 0 and under 0.5, got {options.heldout_fraction}")
            if options.workers < 0:
                parser.error(f"--workers must be at least 0, got {options.workers}")
            if not (options.output / MANIFEST_NAME).exists():
                resolve_shards(options.input, "--input")
            load = functools.partial(Tokenizer.load, options.tokenizer, options.eos_token)
            source = SourceConfig(path=options.input, text_column=options.text_column, ids_column=options.ids_column)
            manifest = prepare_corpus(
                options.output, {options.source: source}, load(), load, options.heldout_fraction, options.workers
            )
        elif options.verify:
            manifest = load_manifest(options.output)
        else:
            parser.error("give --input, --verify or both")
        for line in describe(manifest):
            print(line)
        if options.verify:
            print(f"{manifest.verify(options.output)} files are as the manifest says")
        print(f"fingerprint {manifest.fingerprint}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    outlive_reader()
    sys.exit(main())
