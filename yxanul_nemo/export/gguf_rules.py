"""Whether llama.cpp has a tokenizer like ours. Light, so that the launcher can ask before anything is trained."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from data_prep.tokenizers.superbpe_rules import superword_rules
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.errors import UserError
from yxanul_nemo.json_files import MAX_TOKENIZER_BYTES, read_json


def require_expressible(tokenizer: Tokenizer, folder: Path) -> str:
    """llama.cpp's name of how `tokenizer`, saved in `folder`, cuts text before merging.

    llama.cpp knows such rules by name only and has them in its code. Two are the same as here: `superbpe` (digit groups apart,
    all else in one piece), which differs only inside runs of more than 510 digits, and `gpt-2`.

    Raises:
        UserError: the package is not installed, or llama.cpp has no such tokenizer.
    """
    where = "export.formats"
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            where, "has gguf, but its package is not installed", fix="Run `uv sync --inexact --extra gguf`."
        )
    if tokenizer.library == "sentencepiece":
        raise UserError(where, "has gguf, and the tokenizer is of sentencepiece", "a byte-level BPE", "Leave gguf out.")
    described = read_json(folder / "tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES)
    rules = {
        "superbpe": superword_rules(),
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    }
    if described["model"].get("type") == "BPE" and described.get("normalizer") is None:
        for name, rule in rules.items():
            if _plain(described.get("pre_tokenizer")) == _plain(_described(rule)):
                return name
    raise UserError(
        where,
        "has gguf, and the tokenizer cuts text in a way that llama.cpp has no name for",
        "the rules of SuperBPE or of GPT-2",
        "Leave gguf out; llama.cpp would cut this model's texts into other tokens than it was trained on.",
    )


def _described(rule: pre_tokenizers.PreTokenizer) -> Any:
    """A rule as tokenizer.json has it."""
    holder = tokenizers.Tokenizer(tokenizers.models.BPE())
    holder.pre_tokenizer = rule
    return json.loads(holder.to_str())["pre_tokenizer"]


def _plain(rule: Any) -> Any:
    """Such a description without `trim_offsets`, which concerns places in the text and no ids."""
    if isinstance(rule, dict):
        return {key: _plain(value) for key, value in rule.items() if key != "trim_offsets"}
    return [_plain(value) for value in rule] if isinstance(rule, list) else rule
