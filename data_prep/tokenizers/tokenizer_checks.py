"""What a tokenizer.json may ask of the `tokenizers` library, whoever wrote it: parts by an allow-list, and bounds on what they cost.

The library does what the file says. A few nested replacements make gigabytes of a word, a pattern can take longer than anybody
waits, and numbers that do not fit end in a panic of Rust instead of an exception.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from data_prep.tokenizers.charsmap import charsmap_growth
from data_prep.tokenizers.pattern_checks import pattern_problem
from yxanul_nemo.errors import UserError

MOST_IDS = 1 << 24
MOST_PARTS, MOST_DEPTH = 64, 8
MOST_TOKEN_CHARS = 4096
MOST_AFFIX_CHARS = 64
MOST_GROWTH = 512
"""Largest factor by which rules may lengthen a text. NFKC makes 11 bytes of one, Metaspace 5."""
FIX = "Get the tokenizer from its maker, or as a sentencepiece .model file."

GROWTH: dict[str, dict[str, float]] = {
    "normalizer": {
        "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "Strip": 1, "StripAccents": 1, "Nmt": 1, "BertNormalizer": 4,
        "ByteLevel": 2, "Prepend": 2, "Replace": math.nan, "Precompiled": math.nan,
    },
    "pre_tokenizer": {
        "ByteLevel": 2, "Metaspace": 5, "Split": 1, "Digits": 1, "Punctuation": 1, "Whitespace": 1, "WhitespaceSplit": 1,
        "BertPreTokenizer": 1, "UnicodeScripts": 1,
    },
    "decoder": {
        "ByteLevel": 1, "Metaspace": 1, "ByteFallback": 1, "Fuse": 1, "Strip": 1, "Replace": math.nan, "WordPiece": 2, "BPEDecoder": 2,
    },
}  # fmt: skip
"""Part -> types that are taken -> factor by which one may lengthen a text, in bytes; NaN: depends on its values."""
INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
"""Key under which a Sequence keeps its members."""


def check_tokenizer_json(described: Any, where: object) -> None:
    """Refuse a tokenizer.json that could harm its reader; what only makes no sense is left to the library.

    Raises:
        UserError: names the part and what is wrong with it.
    """
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        _refuse(where, "has no model")
    growth = 1.0
    for part in GROWTH:
        if described.get(part) is not None:
            factor = _Rules(where, part).growth(described[part])
            growth = factor if part == "decoder" else growth * factor
        if growth > MOST_GROWTH:
            _refuse(where, f"its {part} makes a text up to {growth:,.0f} times as long")
    _check_model(described["model"], where)
    _check_added(described.get("added_tokens") or [], where)


def _refuse(where: object, problem: str) -> NoReturn:
    raise UserError(where, problem, "a tokenizer.json as SuperBPE, GPT-2 or Llama have it", FIX)


class _Rules:
    """The parts of a normalizer, pre-tokenizer or decoder, which may hold others."""

    def __init__(self, where: object, part: str):
        self.where, self.part, self.count = where, part, 0

    def growth(self, rule: Any, depth: int = 0) -> float:
        """Factor by which a rule may lengthen a text; UserError if it is not one that is taken."""
        self.count += 1
        kind = rule.get("type") if isinstance(rule, dict) else None
        if self.count > MOST_PARTS or depth > MOST_DEPTH:
            _refuse(self.where, f"its {self.part} has more than {MOST_PARTS} parts or {MOST_DEPTH} levels")
        if kind == "Sequence":
            inner = rule.get(INNER[self.part])
            if not isinstance(inner, list):
                _refuse(self.where, f"its {self.part} has a Sequence without {INNER[self.part]}")
            return math.prod(self.growth(one, depth + 1) for one in inner)
        if not isinstance(kind, str) or kind not in GROWTH[self.part]:
            _refuse(self.where, f"its {self.part} has a part of type {str(kind)[:40]!r}")
        for key in ("content", "prepend", "prefix", "suffix"):
            if key in rule and (not isinstance(rule[key], str) or len(rule[key]) > MOST_AFFIX_CHARS):
                _refuse(
                    self.where,
                    f"its {self.part} has a {kind} with another {key} than up to {MOST_AFFIX_CHARS} characters",
                )
        for key in ("start", "stop"):
            if key in rule and not (type(rule[key]) is int and 0 <= rule[key] <= MOST_AFFIX_CHARS):
                _refuse(self.where, f"its {self.part} has a {kind} with {key}={str(rule[key])[:20]}")
        pattern_bytes = self._pattern(rule.get("pattern"), kind) if "pattern" in rule else 0
        if kind == "Replace":
            made = len(rule.get("content", "").encode(errors="replace"))
            # A regular expression may match nothing, between any two characters.
            return max(1.0, made / pattern_bytes) if pattern_bytes else 1.0 + made
        if kind == "Precompiled":
            return self._precompiled(rule.get("precompiled_charsmap"))
        return GROWTH[self.part][kind]

    def _pattern(self, pattern: Any, kind: str) -> int:
        """Bytes that a match has at least; 0 if that is not known."""
        if isinstance(pattern, dict) and len(pattern) == 1:
            if isinstance(text := pattern.get("String"), str) and text:
                return len(text.encode(errors="replace"))
            if isinstance(regex := pattern.get("Regex"), str):
                if problem := pattern_problem(regex):
                    _refuse(self.where, f"its {self.part} has a pattern that {problem} ({regex[:80]!r})")
                return 0
        _refuse(self.where, f"its {self.part} has a {kind} without a pattern")

    def _precompiled(self, encoded: Any) -> float:
        try:
            return charsmap_growth(base64.b64decode(encoded, validate=True))
        except (ValueError, TypeError) as error:
            _refuse(self.where, f"its {self.part} has a Precompiled that is damaged ({error})")


def _check_model(model: Mapping[str, Any], where: object) -> None:
    kind = model.get("type", "BPE" if "merges" in model else None)
    vocab = model.get("vocab")
    if kind == "Unigram":
        _check_scores(vocab, model.get("unk_id"), where)
        return
    if kind not in ("BPE", "WordPiece", "WordLevel"):
        _refuse(where, f"has a model of type {str(kind)[:40]!r}")
    if not isinstance(vocab, dict) or not vocab:
        _refuse(where, "has a model without vocab")
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < MOST_IDS or len(token) > MOST_TOKEN_CHARS:
            _refuse(where, f"has the token {token[:40]!r} with the id {str(number)[:20]}")
    if (unknown := model.get("unk_token")) is not None and (not isinstance(unknown, str) or unknown not in vocab):
        _refuse(where, f"its model has the unk_token {str(unknown)[:40]!r}, which is not in its vocab")
    if kind == "WordPiece" and not _is_count(model.get("max_input_chars_per_word", 100), 1000):
        _refuse(where, f"its model has max_input_chars_per_word={str(model['max_input_chars_per_word'])[:20]}")
    if kind == "BPE":
        _check_merges(model, where)


def _check_scores(vocab: Any, unknown: Any, where: object) -> None:
    if not isinstance(vocab, list) or not 0 < len(vocab) <= MOST_IDS:
        _refuse(where, "has a model without vocab")
    for entry in vocab:
        match entry:
            case [str(piece), int() | float() as score] if 0 < len(piece) <= MOST_TOKEN_CHARS and _is_finite(score):
                continue
        _refuse(where, f"its model has {str(entry)[:60]} for a piece and its score")
    if unknown is not None and not _is_count(unknown, len(vocab) - 1):
        _refuse(where, f"its model has unk_id={str(unknown)[:20]}")


def _check_merges(model: Mapping[str, Any], where: object) -> None:
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if (affix := model.get(key)) is not None and (not isinstance(affix, str) or len(affix) > MOST_AFFIX_CHARS):
            _refuse(where, f"its model has another {key} than a short text")
    merges, prefix = model.get("merges"), model.get("continuing_subword_prefix") or ""
    if not isinstance(merges, list) or len(merges) > MOST_IDS:
        _refuse(where, "has a model without merges")
    if prefix:
        # The library cuts the prefix off without looking.
        for merge in merges:
            right = (
                merge.partition(" ")[2]
                if isinstance(merge, str)
                else merge[-1]
                if isinstance(merge, list) and merge
                else None
            )
            if not isinstance(right, str) or not right.startswith(prefix):
                _refuse(where, f"its model has the merge {str(merge)[:60]!r}, whose second half lacks {prefix!r}")


def _check_added(added: Any, where: object) -> None:
    if not isinstance(added, list):
        _refuse(where, "has added_tokens that are no list")
    for entry in added:
        match entry:
            case {"id": int(number), "content": str(content)} if 0 < len(content) <= MOST_TOKEN_CHARS and _is_count(
                number, MOST_IDS
            ):
                continue
        _refuse(where, f"has the added token {str(entry)[:60]}")


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_finite(value: float) -> bool:
    return not isinstance(value, bool) and abs(value) < 1e30
