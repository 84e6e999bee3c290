"""A faster way to the same ids: SuperBPE's merges inside words from a memory of pieces, its merges across words on what is left.

Byte-pair encoding applies merges strictly by rank. Let T be the rank of the first merge that crosses one of a few borders which
words hardly ever cross (letter to space, letter to punctuation, ...). Then

- merges below T never cross those borders, so text may be cut there and each piece encoded alone; pieces repeat, so most are
  found in a dictionary,
- merges from T on make tokens that no merge below T makes, so none that a merge below T takes: they can be applied afterwards,
  by themselves,
- digit groups are cut off by the pre-tokenizer, and no merge from T on joins an ASCII digit to anything in ASCII.

The second half is the `tokenizers` library's own BPE over one private character for each token so far, which is a text about
five times shorter. The conditions are checked for the tokenizer at hand; where one fails, there is no such encoder.
"""

import json
import re
from collections.abc import Sequence
from typing import Self

import numpy as np
import tokenizers
from tokenizers import models

from data_prep.superbpe_rules import follows_superword_rules, superword_rules, token_contents

FIRST_PRIVATE = 0x10000
"""Token i stands as the character FIRST_PRIVATE + i; Unicode ends above a million."""
MEMORY_PIECES = 400_000
"""Pieces remembered; about 100 MB. A full memory starts anew."""
LONGEST_REMEMBERED = 48
"""Characters of the longest piece that is remembered."""
SHORT_PIECES = 16
"""A text with fewer pieces than one for so many characters (Chinese, say) gains nothing and is encoded the plain way."""
LEAST_SHARE = 0.1
"""Share of merges that must lie below T for the way round to pay."""

_LETTERS, _BLANKS, _DIGITS = "A-Za-z", r"\x00-\x20\x7f", "0-9"
_PUNCTUATION = r"""!-/:-@\[-`{-~"""
_PUNCTUATION_BUT_APOSTROPHE = r"""!-&(-/:-@\[-`{-~"""
_BEYOND_ASCII = r"\x80-\U0010ffff"

_BESIDE_DIGIT = re.compile(rb"[0-9][\x00-\x7f]|[\x00-\x7f][0-9]")


def _borders(punctuation: str) -> re.Pattern[bytes]:
    """Two bytes with a border between them."""
    pairs = [(_LETTERS, _BLANKS), (_LETTERS, punctuation), (punctuation, _LETTERS), (punctuation, _BLANKS)]
    return re.compile("|".join(f"[{left}][{right}]" for left, right in pairs).encode())


def _pieces(punctuation: str, glue: str) -> re.Pattern[str]:
    """Matches one piece after another; each ends at a border, beside a digit, or with the text.

    A character of `glue` (all that no border is known for) holds together what it touches, and so do digits beside it, since
    they may be one number. Repetition is possessive throughout, so that matching takes linear time.
    """
    plain = rf"[{_LETTERS}]++(?![{glue}])|[{punctuation}]++(?![{glue}])"
    glued = rf"(?:[{_LETTERS}{punctuation}{_DIGITS}]*+[{glue}]++[{_BLANKS}{_DIGITS}]*+)++(?:[{_LETTERS}]++|[{punctuation}]++)?+"
    # Digits come first: what is glued is looked for from a letter or digit only where glue follows its run, or after a blank.
    return re.compile(rf"[{_DIGITS}]++(?![{glue}])|[{_BLANKS}]*+(?:{plain}|{glued})|[{_BLANKS}]++")


class SuperwordEncoder:
    """Encodes as the tokenizer it was made for; threads may share it."""

    @classmethod
    def for_tokenizer(cls, tokenizer: tokenizers.Tokenizer) -> Self | None:
        """The encoder, or None if the tokenizer's rules are not SuperBPE's or its merges do not meet the conditions."""
        description = json.loads(tokenizer.to_str())
        if not follows_superword_rules(description):
            return None
        model = description["model"]
        merges = [(left, right) for left, right in model["merges"]]
        made = [left + right for left, right in merges]
        contents = token_contents(made)
        first_crossing, punctuation = max(
            (_first_crossing(contents, _borders(kind)), kind) for kind in (_PUNCTUATION, _PUNCTUATION_BUT_APOSTROPHE)
        )
        below, above = (
            {token for token in model["vocab"] if len(token) == 1} | set(made[:first_crossing]),
            made[first_crossing:],
        )
        if (
            first_crossing < LEAST_SHARE * len(merges)
            or any(map(_BESIDE_DIGIT.search, contents[first_crossing:]))
            or len(set(above)) != len(above)
            or not below.isdisjoint(above)
            or below.union(above) != model["vocab"].keys()
        ):
            return None
        return cls(tokenizer, model["vocab"], merges, first_crossing, punctuation)

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        first_crossing: int,
        punctuation: str,
    ):
        """Use `for_tokenizer`, which checks the conditions."""
        self._plain = tokenizer
        self._always_matched = [
            token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special
        ]
        glue = _BEYOND_ASCII if punctuation == _PUNCTUATION else "'" + _BEYOND_ASCII
        self._pieces = _pieces(punctuation, glue)
        below = {token for token in vocab if len(token) == 1} | {
            left + right for left, right in merges[:first_crossing]
        }
        # The library wants ids without gaps; these are renumbered in the order of the vocabulary's.
        names = sorted(below, key=vocab.__getitem__)
        self._inside = tokenizers.Tokenizer(
            models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=merges[:first_crossing])
        )
        self._inside.pre_tokenizer = superword_rules()
        self._characters = [chr(FIRST_PRIVATE + place) for place in range(len(names))]
        private = dict(zip(names, self._characters, strict=True))
        across = []
        for left, right in merges[first_crossing:]:
            across.append((private[left], private[right]))
            private[left + right] = private[left] + private[right]
        self._barrier_id = max(vocab.values()) + 1
        self._barrier = chr(FIRST_PRIVATE + len(names))
        private_vocab = {private[token]: number for token, number in vocab.items()} | {self._barrier: self._barrier_id}
        self._across = tokenizers.Tokenizer(models.BPE(vocab=private_vocab, merges=across))
        self._memory = _Memory(self)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 of shape [tokens]."""
        results: list[np.ndarray | None] = [None] * len(texts)
        plain: list[int] = []
        short: list[int] = []
        pieces_of: list[list[str]] = []
        for place, text in enumerate(texts):
            pieces = self._pieces.findall(text)
            if len(pieces) * SHORT_PIECES < len(text) or any(token in text for token in self._always_matched):
                plain.append(place)
            else:
                short.append(place)
                pieces_of.append(pieces)
        if len(self._memory) > MEMORY_PIECES:
            self._memory.clear()
        self._learn(pieces_of)
        rewritten = ["".join(map(self._memory.__getitem__, pieces)) for pieces in pieces_of]
        encodings = self._across.encode_batch_fast(rewritten, add_special_tokens=False)
        for place, string, encoding in zip(short, rewritten, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            results[place] = ids[ids != self._barrier_id] if self._barrier in string else ids
        encodings = self._plain.encode_batch_fast([texts[place] for place in plain], add_special_tokens=False)
        for place, encoding in zip(plain, encodings, strict=True):
            results[place] = np.array(encoding.ids, dtype=np.int32)
        return [ids for ids in results if ids is not None]

    def _learn(self, pieces_of: Sequence[Sequence[str]]) -> None:
        """Put new pieces into the memory, many at a time: one by one, the calls would cost more than the merges."""
        new = [piece for piece in set().union(*pieces_of) if piece not in self._memory]
        plain = [piece for piece in new if len(piece) <= LONGEST_REMEMBERED and piece.isascii()]
        encodings = self._inside.encode_batch_fast(plain, add_special_tokens=False)
        for piece, encoding in zip(plain, encodings, strict=True):
            self._memory[piece] = "".join(map(self._characters.__getitem__, encoding.ids))

    def rewrite(self, piece: str) -> str:
        """The tokens of a piece after the merges below T, as private characters."""
        encoding = self._inside.encode(piece, add_special_tokens=False)
        # Digits beyond ASCII are cut off inside the piece. Their bytes are those of other characters, too, so that a merge
        # across the cut has to be kept from happening.
        parts: list[list[str]] = [[]]
        previous = 0
        for number, word in zip(encoding.ids, encoding.word_ids, strict=True):
            if word != previous:
                parts.append([])
                previous = word
            parts[-1].append(self._characters[number])
        return self._barrier.join(map("".join, parts))


class _Memory(dict[str, str]):
    """Pieces and what they are rewritten to, filled as they are asked for."""

    def __init__(self, encoder: SuperwordEncoder):
        super().__init__()
        self._encoder = encoder

    def __missing__(self, piece: str) -> str:
        rewritten = self._encoder.rewrite(piece)
        if len(piece) <= LONGEST_REMEMBERED:
            self[piece] = rewritten
        return rewritten


def _first_crossing(contents: Sequence[bytes], borders: re.Pattern[bytes]) -> int:
    return next((rank for rank, content in enumerate(contents) if borders.search(content)), len(contents))
