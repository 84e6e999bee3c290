"""Command line for training a tokenizer: `python -m data_prep.train_superbpe --help`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.corpus.find_shards import resolve_shards
from data_prep.corpus.open_shard import open_shard
from data_prep.tokenizers.superbpe_training import train_bpe, train_superbpe
from data_prep.tokenizers.tokenizer import Tokenizer, save_new
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import configure_logging, logger
from yxanul_nemo.streams import outlive_reader


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the tool; returns the exit code."""
    options = _options(arguments)
    configure_logging()
    try:
        if options.output.exists() and any(options.output.iterdir()):
            raise UserError(options.output, "is not empty", "a new folder", "Give another --output, or remove it.")
        shards = [shard for path in options.input for shard in resolve_shards(path, "--input")]

        def texts() -> Iterator[str]:
            for shard in shards:
                with open_shard(shard, options.text_column) as reader:
                    for batch in reader.batches():
                        yield from batch.texts

        specials = [options.eos_token] + ([options.pad_token] if options.pad_token else [])
        if options.plain:
            made = train_bpe(texts, options.vocab_size, specials, options.max_bytes)
        else:
            made = train_superbpe(
                texts,
                options.vocab_size,
                options.transition,
                specials,
                options.max_words,
                options.cross_newline,
                options.cross_colon,
                options.max_bytes,
            )
        tokenizer = Tokenizer.wrap(made, options.eos_token, options.pad_token, options.output)
        settings = {key: value for key, value in vars(options).items() if key not in ("input", "output")}
        save_new(tokenizer, options.output, settings, {})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logger.info("wrote %s: %d ids, fingerprint %s", options.output, tokenizer.vocab_size, tokenizer.fingerprint)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.train_superbpe",
        description="Train a SuperBPE tokenizer (or with --plain a BPE tokenizer) on the text of parquet, JSON lines or text files. "
        "The result is a folder that transformers.AutoTokenizer loads; use it with tokenizer.kind=huggingface tokenizer.path=DIR.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="folders, globs in quotes, or files")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the tokenizer")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="V", help="size of the vocabulary, special tokens included"
    )
    parser.add_argument(
        "--transition", type=int, metavar="t", help="vocabulary size at which merges begin to cross words"
    )
    parser.add_argument("--plain", action="store_true", help="plain BPE inside words, as a control")
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="column with the text (default: %(default)s)"
    )
    parser.add_argument(
        "--max-bytes",
        type=lambda value: int(float(value)),
        default=100_000_000,
        metavar="N",
        help="text to train on, in bytes of UTF-8; it is taken from the start of the input (default: %(default)s)",
    )
    parser.add_argument(
        "--max-words", type=int, default=4, metavar="N", help="longest token, in words (default: %(default)s)"
    )
    parser.add_argument("--cross-newline", action="store_true", help="allow text after a newline within a token")
    parser.add_argument("--cross-colon", action="store_true", help="allow ': text' within a token")
    parser.add_argument(
        "--eos-token", default="<|endoftext|>", metavar="TOKEN", help="end of document (default: %(default)s)"
    )
    parser.add_argument("--pad-token", metavar="TOKEN", help="padding token (default: none of its own)")
    options = parser.parse_args(arguments)
    if options.plain == (options.transition is not None):
        parser.error("give either --transition or --plain")
    for name in ("vocab_size", "max_bytes", "max_words"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    outlive_reader()
    sys.exit(main())
