"""The rules of byte-level BPE and of SuperBPE: how text is cut before merging, and how a tokenizer is put together."""

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

LONGEST_DIGIT_PIECE = 510
"""Longest run of digits that is looked at as one. The rule below it costs the square of a run's length, so runs are bounded first:
a multiple of 3, and every run that text really holds is shorter, so that ids stay those of the unbounded rule."""

GROUPS_OF_THREE = r"(?=(\d{3})+(?!\d))"
"""Cuts a run of digits so that its groups of three end where the run ends: 1234567 -> 1 234 567."""

UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1} - set(range(0xF5, 0x100))
"""The 243 bytes that can occur in valid UTF-8."""


def _digit_rules() -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{LONGEST_DIGIT_PIECE}}}"), "isolated"),
        pre_tokenizers.Split(Regex(GROUPS_OF_THREE), "isolated"),
    ]


def superword_rules() -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of a finished SuperBPE tokenizer: digit groups apart, everything else in one piece."""
    return pre_tokenizers.Sequence([*_digit_rules(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def follows_superword_rules(description: dict[str, Any]) -> bool:
    """Whether a tokenizer (its tokenizer.json as a dictionary) is plain BPE after `superword_rules` and nothing else."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = superword_rules()
    expected = json.loads(plain.to_str())
    model = description["model"]
    return all(
        model.get(key) == value for key, value in expected["model"].items() if key not in ("vocab", "merges")
    ) and all(description[part] == expected[part] for part in ("normalizer", "pre_tokenizer", "post_processor"))


def word_rules() -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of plain byte-level BPE and of SuperBPE's first stage: digit groups apart, then GPT-2's words."""
    return pre_tokenizers.Sequence([*_digit_rules(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character for each byte, as GPT-2 defined it: character -> byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def token_contents(tokens: Sequence[str]) -> list[bytes]:
    """The bytes that byte-level tokens stand for."""
    between = chr(256)
    table = {ord(character): byte for character, byte in byte_alphabet().items()} | {ord(" "): between}
    text = " ".join(tokens).translate(table)  # A space stands for no byte there.
    return [content.encode("latin-1") for content in text.split(between)] if tokens else []


def assemble(
    vocab: dict[str, int], merges: list[tuple[str, str]], rules: pre_tokenizers.PreTokenizer, added: list[AddedToken]
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of these parts; `added` get the ids after the vocabulary, in their order."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = rules
    tokenizer.decoder = decoders.ByteLevel()
    for token in added:
        # One at a time: both methods number new tokens in the order of the calls.
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer
