"""Comparison of an engine's tokens with the answers of `answers.py`. It imports nothing but the standard library."""

import json
import platform
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

TIE = 1e-3
"""Logits this close together, rounding in FP32 decides about: a difference there is named and is no failure."""


def read_answers(path: str) -> dict[str, Any]:
    """`eos_id` and `answers`: prompt, ids, tokens and margins of each."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def compare(
    packages: Iterable[str],
    answers: dict[str, Any],
    ids_of: Callable[[str], list[int]],
    tokens_of: Callable[[dict[str, Any], int], list[int]],
) -> None:
    """Print what is equal and where the first difference stands; end with exit code 1 if more than a tie differs.

    Args:
        packages: whose versions are printed.
        answers: of `read_answers`.
        ids_of: a prompt -> ids that the engine makes of it by itself.
        tokens_of: an answer and a number of tokens -> what the engine writes after the prompt, without EOS among its choices.
    """
    print(", ".join(f"{name} {version(name)}" for name in packages) + f", Python {platform.python_version()}")
    rows, differing, ties = answers["answers"], 0, 0
    same_ids = sum(ids_of(row["prompt"]) == row["ids"] for row in rows)
    print(f"prompts cut into the same ids, EOS before them: {same_ids} of {len(rows)}")
    for row in rows:
        tokens = tokens_of(row, len(row["tokens"]))
        if tokens != row["tokens"]:
            pairs = zip(tokens, row["tokens"], strict=False)
            first = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), len(tokens))
            margin = row["margins"][min(first, len(row["margins"]) - 1)]
            ties, differing = (ties + 1, differing) if margin < TIE else (ties, differing + 1)
            print(f"  {row['prompt']!r}: {first} equal tokens, then the two most likely are {margin:.2g} logits apart")
    print(
        f"answers with {len(rows[0]['tokens'])} equal greedy tokens: {len(rows) - differing - ties} of {len(rows)}, others by ties: {ties}"
    )
    if differing or same_ids < len(rows):
        sys.exit(1)
