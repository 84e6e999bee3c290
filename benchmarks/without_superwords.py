"""Plain BPE from a SuperBPE tokenizer: its vocabulary and merges behind the rule that cuts at words, so that superwords cannot form.

    python -m benchmarks.without_superwords --tokenizer SUPERBPE_FOLDER --output FOLDER

The control for what superwords bring: the same training text and merges, the same model size. Of t180k that is plain BPE with 179,992
merges; the 20,000 superwords stay in the vocabulary, unused.
"""

import argparse
from pathlib import Path

from data_prep.tokenizers.superbpe import build_superbpe
from data_prep.tokenizers.superbpe_rules import word_rules
from data_prep.tokenizers.tokenizer import Tokenizer


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = build_superbpe(arguments.tokenizer)
    tokenizer.pre_tokenizer = word_rules()
    Tokenizer.wrap(tokenizer, "<|endoftext|>", "<|padding|>", arguments.tokenizer).save(arguments.output)


if __name__ == "__main__":
    main()
