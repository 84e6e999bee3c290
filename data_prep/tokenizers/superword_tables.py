"""What the faster encoder knows of a SuperBPE tokenizer, and the conditions under which its way round gives the same ids.

Let T be the rank of the first merge that crosses one of a few borders which words hardly ever cross: letter to space, letter to
punctuation, ... The conditions are that no token is made both below T and from T on, and that no merge from T on joins an ASCII digit to
anything in ASCII. `superword_encoder` says what follows from them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import tokenizers

from data_prep.tokenizers.pair_merging import MOST_IDS, PairMerges
from data_prep.tokenizers.superbpe_rules import UTF8_BYTES, byte_alphabet, follows_superword_rules, token_contents

LEAST_SHARE = 0.1
"""Share of merges that must lie below T for the way round to pay."""
JOIN_BITS = 21
"""Size of the table of tokens that may be joined: 2 MB, for some 100,000 pairs."""

_LETTERS, _BLANKS, _DIGITS = "A-Za-z", r"\x00-\x20\x7f", "0-9"
_PUNCTUATION = r"""!-/:-@\[-`{-~"""
_PUNCTUATION_BUT_APOSTROPHE = r"""!-&(-/:-@\[-`{-~"""
_BESIDE_DIGIT = re.compile(rb"[0-9][\x00-\x7f]|[\x00-\x7f][0-9]")


@dataclass(frozen=True)
class SuperwordTables:
    """Tables of a tokenizer that meets the conditions; arrays, so that they are quickly sent to another process."""

    merges: PairMerges
    first_crossing: int
    """T."""
    byte_ids: np.ndarray
    """[256] id of the token of each byte, int32."""
    cut_before: bytes
    cut_after: bytes
    """For `bytes.translate`: text may be cut between two bytes if the first's value in `cut_before` and the second's in `cut_after`
    share a bit."""
    may_join: np.ndarray
    """[2 ** JOIN_BITS] at `join_places`, whether a merge from T on may join two tokens across their border, bool."""
    always_matched: list[bytes]
    """Texts of tokens that are found before any merging."""

    @classmethod
    def for_tokenizer(cls, tokenizer: tokenizers.Tokenizer) -> Self | None:
        """The tables, or None if the tokenizer's rules are not SuperBPE's or its merges do not meet the conditions."""
        description = json.loads(tokenizer.to_str())
        if not follows_superword_rules(description):
            return None
        vocab: dict[str, int] = description["model"]["vocab"]
        merges = [(left, right) for left, right in description["model"]["merges"]]
        made = [left + right for left, right in merges]
        contents = token_contents(made)
        first_crossing, punctuation = max(
            (_first_crossing(contents, _borders(kind)), kind) for kind in (_PUNCTUATION, _PUNCTUATION_BUT_APOSTROPHE)
        )
        single = {token for token in vocab if len(token) == 1}
        below, above = single | set(made[:first_crossing]), made[first_crossing:]
        alphabet = byte_alphabet()
        if (
            not merges
            or first_crossing < LEAST_SHARE * len(merges)
            or any(map(_BESIDE_DIGIT.search, contents[first_crossing:]))
            or len(set(above)) != len(above)
            or not below.isdisjoint(above)
            or below.union(above) != vocab.keys()
            or len(set(merges)) != len(merges)
            or max(vocab.values()) >= MOST_IDS
            or not {character for character, byte in alphabet.items() if byte in UTF8_BYTES} <= single
        ):
            return None
        left, right = ([vocab[pair[side]] for pair in merges] for side in (0, 1))
        made_ids = [vocab[token] for token in made]
        byte_ids = np.zeros(256, dtype=np.int32)
        for character, byte in alphabet.items():
            byte_ids[byte] = vocab.get(character, 0)  # The other bytes do not occur.
        matched = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
        return cls(
            PairMerges(np.array(left), np.array(right), np.array(made_ids)),
            first_crossing,
            byte_ids,
            *_cut_tables(punctuation),
            _may_join(left[first_crossing:], right[first_crossing:], made_ids[first_crossing:]),
            [token.content.encode() for token in matched],
        )


def join_places(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where `may_join` speaks of pairs of tokens. A pair that shares its place with others may be said to be joined wrongly."""
    mixed = left.astype(np.uint32) * np.uint32(0x9E3779B1) + right.astype(np.uint32) * np.uint32(0x85EBCA6B)
    return mixed >> np.uint32(32 - JOIN_BITS)


def _may_join(left: Sequence[int], right: Sequence[int], made: Sequence[int]) -> np.ndarray:
    """The table for merges of `left` and `right` to `made`: the pairs that lie side by side in some token that they make."""
    table = np.zeros(1 << JOIN_BITS, dtype=bool)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    before, after = [], []
    for one, other, both in zip(left, right, made, strict=True):
        before.append(last.get(one, one))
        after.append(first.get(other, other))
        first[both], last[both] = first.get(one, one), last.get(other, other)
    table[join_places(np.array(before, dtype=np.int64), np.array(after, dtype=np.int64))] = True
    return table


def _border_pairs(punctuation: str) -> list[tuple[str, str]]:
    return [(_LETTERS, _BLANKS), (_LETTERS, punctuation), (punctuation, _LETTERS), (punctuation, _BLANKS)]


def _borders(punctuation: str) -> re.Pattern[bytes]:
    """Two bytes with a border between them."""
    return re.compile("|".join(f"[{left}][{right}]" for left, right in _border_pairs(punctuation)).encode())


def _first_crossing(contents: Sequence[bytes], borders: re.Pattern[bytes]) -> int:
    return next((rank for rank, content in enumerate(contents) if borders.search(content)), len(contents))


def _cut_tables(punctuation: str) -> tuple[bytes, bytes]:
    """`cut_before` and `cut_after`: between the two sides of a border, and beside ASCII digits in ASCII."""
    but_digits = f"{_LETTERS}{_BLANKS}{_PUNCTUATION}"
    before, after = bytearray(256), bytearray(256)
    for bit, pair in enumerate([*_border_pairs(punctuation), (_DIGITS, but_digits), (but_digits, _DIGITS)]):
        for table, characters in zip((before, after), pair, strict=True):
            for byte in re.findall(f"[{characters}]".encode(), bytes(range(256))):
                table[ord(byte)] |= 1 << bit
    return bytes(before), bytes(after)
