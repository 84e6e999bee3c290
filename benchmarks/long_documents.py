"""Processor time of encoding one document, by its length.

    python -m benchmarks.long_documents --tokenizer runs/RUN/tokenizer

Each row is one kind of text at rising lengths, in nanoseconds of processor time per character: equal figures in a row are linear time.
`--plain` measures the `tokenizers` library on the whole document instead.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table

from data_prep.tokenizers.tokenizer import Tokenizer

LENGTHS = (600_000, 4_000_000, 16_000_000)
WORDS = (
    "the",
    "of",
    "and",
    "in",
    "to",
    "model",
    "data",
    "a",
    "is",
    "token",
    "length",
    "text",
    "document.",
    "(see)",
    "\n",
)
KINDS: dict[str, Callable[[int], str]] = {
    "digits": lambda length: "".join(random.Random(0).choices("0123456789", k=length)),
    "words": lambda length: (" ".join(random.Random(0).choices(WORDS, k=length // 4)) + " " * length)[:length],
    "letters": lambda length: "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=length)),
    "one letter": lambda length: "a" * length,
    "spaces": lambda length: " " * length,
}


def main(arguments: list[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--plain", action="store_true", help="the bare library")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="texts to measure")
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode: Callable[[str], object] = Tokenizer.load(options.tokenizer).encode
    if options.plain:
        library = tokenizers.Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
        library.encode_special_tokens = True
        encode = lambda text: np.array(library.encode_batch_fast([text], add_special_tokens=False)[0].ids)  # noqa: E731
    table = Table(title="nanoseconds per character, by number of characters")
    for column in ("text", *(f"{length:,}" for length in LENGTHS)):
        table.add_column(column, justify="left" if column == "text" else "right")
    for kind in options.kinds:
        cells = []
        for length in LENGTHS:
            text = KINDS[kind](length)
            start = time.process_time()
            encode(text)
            cells.append(f"{(time.process_time() - start) / length * 1e9:,.0f}")
        table.add_row(kind, *cells)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
