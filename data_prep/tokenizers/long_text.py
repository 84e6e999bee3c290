"""Very long documents in linear time and bounded memory: encoded span by span, with the ids of encoding them whole.

The `tokenizers` library keeps one heap of merges for all text between two cuts of the pre-tokenizer. SuperBPE cuts beside digits
only, so that a document is one such text: 16 million characters cost 20 to 40 times one million, and gigabytes of memory.

What byte-pair encoding (merges by rank, equal ranks from the left) does to a text is determined by neighbours: a sequence of
tokens is the encoding of its text if and only if each two adjacent tokens are the encoding of theirs. For as long as no merge has
crossed a border of the sequence, the pair on both sides of it passes through the states that it passes through alone, so the first
merge to cross would cross there, too. Hence, where the next span is made to begin at a border between two tokens of the span
before it, and its first token is the one that the span before it has there, the tokens up to the border and those of the next
span are the encoding of the text of both.
"""

import json
import unicodedata
from collections.abc import Callable
from typing import Self

import numpy as np
import tokenizers

from data_prep.tokenizers.superbpe_rules import byte_alphabet, follows_superword_rules

SPAN_CHARS = 100_000
"""New text in each span."""
OVERLAP_BYTES = 2_000
"""Text that two spans share: the end of a span has other tokens than the whole, but never so far back in text that people wrote."""

Encode = Callable[[str], np.ndarray]


class LongTextEncoder:
    """Encodes texts of more than `SPAN_CHARS` as the tokenizer it was made for, by way of shorter ones."""

    @classmethod
    def for_tokenizer(cls, tokenizer: tokenizers.Tokenizer) -> Self | None:
        """The encoder, or None for rules under which a span may be cut otherwise than the whole text."""
        description = json.loads(tokenizer.to_str())
        added = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
        if (
            not follows_superword_rules(description)
            or not tokenizer.encode_special_tokens
            or any(token.single_word or token.lstrip or token.rstrip for token in added)
            or not set("".join(description["model"]["vocab"])) <= byte_alphabet().keys()
        ):
            return None
        return cls(tokenizer, [token.content for token in added])

    def __init__(self, tokenizer: tokenizers.Tokenizer, always_matched: list[str]):
        """Use `for_tokenizer`, which checks the conditions. `always_matched`: tokens that are found in text before any merging."""
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        self._token_bytes = np.zeros(1 + max(tokenizer.get_vocab(with_added_tokens=True).values()), dtype=np.int64)
        for token, number in vocab.items():
            self._token_bytes[number] = len(token)  # Each byte is one character there.
        for token in always_matched:
            self._token_bytes[tokenizer.token_to_id(token)] = len(token.encode())
        self._matched_pairs = {token[i : i + 2] for token in always_matched for i in range(len(token) - 1)}

    def encode(self, text: str, encode: Encode) -> np.ndarray:
        """Ids [tokens] of `text`; `encode` gives those of a span, and gets each character about once."""
        done: list[np.ndarray] = []
        begin, end = 0, self._cut(text, SPAN_CHARS)
        ids = encode(text[:end])
        while end < len(text):
            border, place = self._border(text, begin, end, ids)
            if border:
                following_end = self._cut(text, end + SPAN_CHARS)
                following = encode(text[place:following_end])
                if following[0] == ids[border]:
                    done.append(ids[:border])
                    begin, end, ids = place, following_end, following
                    continue
            # Nowhere to go on from, as in one endless number: a span twice as long each time, so that work stays linear.
            end = self._cut(text, begin + 2 * (end - begin))
            longer = encode(text[begin:end])
            if longer[0] != ids[0]:
                return encode(text)  # Its end reached back to its beginning, where the span before it was left.
            ids = longer
        return np.concatenate([*done, ids])

    def _cut(self, text: str, place: int) -> int:
        """The first place from `place` on at which text may be cut, or the end of the text."""
        while place < len(text) and not self._separable(text, place):
            place += 1
        return min(place, len(text))

    def _separable(self, text: str, place: int) -> bool:
        """Whether no rule that comes before the merges looks across `place`: those for digits, and for tokens that are always matched.

        Characters that Python's Unicode tables do not know may be digits in the library's.
        """
        around = text[place - 1 : place + 1]
        may_be_digits = all(unicodedata.category(character) in ("Nd", "Nl", "No", "Cn") for character in around)
        return not may_be_digits and around not in self._matched_pairs

    def _border(self, text: str, begin: int, end: int, ids: np.ndarray) -> tuple[int, int]:
        """Where to begin the next span, before the overlap: number of tokens of this one up to there, and the place in the text.

        (0, begin) if there is no such place.
        """
        raw = np.frombuffer(text[begin:end].encode(), dtype=np.uint8)
        starts_character = (raw & 0xC0) != 0x80
        characters = np.cumsum(starts_character)
        ends = np.cumsum(self._token_bytes[ids])
        assert ends[-1] == len(raw), "tokens of a lossless tokenizer have the bytes of their text"
        for border in range(int(np.searchsorted(ends, len(raw) - OVERLAP_BYTES, side="right")), 0, -1):
            offset = int(ends[border - 1])
            if starts_character[offset]:
                place = begin + int(characters[offset - 1])
                if self._separable(text, place):
                    return border, place
        return 0, begin
