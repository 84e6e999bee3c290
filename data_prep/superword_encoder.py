"""A faster way to the same ids: SuperBPE's merges inside words from a memory of pieces, its merges across words on what is left.

Byte-pair encoding applies merges strictly by rank. Let T be the rank of the first merge that crosses one of a few borders which
words hardly ever cross (letter to space, letter to punctuation, ...). Then

- merges below T never cross those borders, so text may be cut there and each piece encoded alone; pieces repeat, so most are
  found in a memory,
- merges from T on make tokens that no merge below T makes, so none that a merge below T takes: they can be applied afterwards,
  by themselves,
- a merge from T on can only join tokens across a border between two that lie side by side in some token made from T on. Few of all
  pairs do, so that what is left falls into short runs, which are merged all at once (`pair_merging`),
- digit groups are cut off by the pre-tokenizer, and no merge from T on joins an ASCII digit to anything in ASCII.

The conditions are checked for the tokenizer at hand; where one fails, there is no such encoder.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Self

import numpy as np
import tokenizers

from data_prep.pair_merging import MOST_IDS, PairMerges
from data_prep.piece_memory import SHORT_BYTES, PieceMemory, short_keys
from data_prep.superbpe_rules import UTF8_BYTES, byte_alphabet, follows_superword_rules, token_contents

MEMORY_PIECES = 400_000
"""Pieces remembered; about 40 MB. A full memory starts anew."""
SLICE_BYTES = 512 << 10
"""Text worked on at a time, so that it stays in the processor's caches."""
LONGEST_PIECE = 256
"""Bytes of the longest piece that is taken; a text with a longer one (Chinese, say) is encoded the plain way."""
LONGEST_RUN = 64
"""Tokens of the longest run that is taken. Work grows with the square of a run's length."""
JOIN_BITS = 21
"""Size of the table of tokens that may be joined: 2 MB, for some 100,000 pairs."""
REFUSED = -1
"""Stands for the ids of a piece that is not taken."""
CUT_BEFORE = 1 << 24
"""Added to the id of a token that the pre-tokenizer keeps apart from the one before it."""
LEAST_SHARE = 0.1
"""Share of merges that must lie below T for the way round to pay."""

_LETTERS, _BLANKS, _DIGITS = "A-Za-z", r"\x00-\x20\x7f", "0-9"
_PUNCTUATION = r"""!-/:-@\[-`{-~"""
_PUNCTUATION_BUT_APOSTROPHE = r"""!-&(-/:-@\[-`{-~"""

_BESIDE_DIGIT = re.compile(rb"[0-9][\x00-\x7f]|[\x00-\x7f][0-9]")
_DIGIT_GROUPS = re.compile(rb"[0-9]{1,3}(?=(?:[0-9]{3})*(?![0-9]))|[^0-9]+")


def _border_pairs(punctuation: str) -> list[tuple[str, str]]:
    return [(_LETTERS, _BLANKS), (_LETTERS, punctuation), (punctuation, _LETTERS), (punctuation, _BLANKS)]


def _borders(punctuation: str) -> re.Pattern[bytes]:
    """Two bytes with a border between them."""
    return re.compile("|".join(f"[{left}][{right}]" for left, right in _border_pairs(punctuation)).encode())


class SuperwordEncoder:
    """Encodes as the tokenizer it was made for; one thread at a time."""

    @classmethod
    def for_tokenizer(cls, tokenizer: tokenizers.Tokenizer) -> Self | None:
        """The encoder, or None if the tokenizer's rules are not SuperBPE's or its merges do not meet the conditions."""
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
        if (
            first_crossing < LEAST_SHARE * len(merges)
            or any(map(_BESIDE_DIGIT.search, contents[first_crossing:]))
            or len(set(above)) != len(above)
            or not below.isdisjoint(above)
            or below.union(above) != vocab.keys()
            or len(set(merges)) != len(merges)
            or max(vocab.values()) >= MOST_IDS
            or not {character for character, byte in byte_alphabet().items() if byte in UTF8_BYTES} <= single
        ):
            return None
        return cls(tokenizer, vocab, merges, first_crossing, punctuation)

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
            token.content.encode() for token in tokenizer.get_added_tokens_decoder().values() if not token.special
        ]
        left = [vocab[token] for token, _ in merges]
        right = [vocab[token] for _, token in merges]
        made = [vocab[left + right] for left, right in merges]
        self._merges = PairMerges(np.array(left), np.array(right), np.array(made))
        self._first_crossing = first_crossing
        self._byte_ids = np.zeros(256, dtype=np.int32)
        for character, byte in byte_alphabet().items():
            self._byte_ids[byte] = vocab.get(character, 0)
        self._cut_before, self._cut_after = _cut_tables(punctuation)
        # First and last of the tokens so far that each token made from T on consists of; two that meet in one may be joined.
        first, last = list(range(max(vocab.values()) + 1)), list(range(max(vocab.values()) + 1))
        meeting = []
        for place in range(first_crossing, len(merges)):
            meeting.append((last[left[place]], first[right[place]]))
            first[made[place]], last[made[place]] = first[left[place]], last[right[place]]
        self._may_join = np.zeros(1 << JOIN_BITS, dtype=bool)
        if meeting:
            self._may_join[_join_places(*np.array(meeting).T)] = True
        self._memory = PieceMemory()
        self._forget()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 of shape [tokens]."""
        raw = [text.encode() for text in texts]
        results: list[np.ndarray] = []
        first = held = 0
        for place, text in enumerate(raw):
            held += len(text)
            if held >= SLICE_BYTES or place == len(raw) - 1:
                results += self._encode_slice(raw[first : place + 1])
                first, held = place + 1, 0
        plain = [place for place, ids in enumerate(results) if ids is None]
        encodings = self._plain.encode_batch_fast([texts[place] for place in plain], add_special_tokens=False)
        for place, encoding in zip(plain, encodings, strict=True):
            results[place] = np.array(encoding.ids, dtype=np.int32)
        return results

    def _encode_slice(self, texts: list[bytes]) -> list[np.ndarray | None]:
        """Ids of each text; None for those to be encoded the plain way."""
        if len(self._memory) > MEMORY_PIECES:
            self._forget()
        text_bounds = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=text_bounds[1:])
        raw = b"".join([*texts, bytes(16)])
        piece_bounds = self._piece_bounds(raw, text_bounds)
        numbers = self._numbers(raw, piece_bounds)
        tokens, token_bounds = self._memory.ids(numbers)
        bounds = token_bounds[np.searchsorted(piece_bounds, text_bounds)]
        special = np.flatnonzero(tokens.view(np.uint32) >= CUT_BEFORE)  # The refused are above it, too.
        refused, apart = special[tokens[special] == REFUSED], special[tokens[special] != REFUSED]
        tokens[refused] = 0
        tokens[apart] -= CUT_BEFORE
        alive, long_runs = self._join(tokens, np.concatenate([bounds, apart]))
        refused = np.concatenate([refused, long_runs])
        plain = set((np.searchsorted(bounds, refused, side="right") - 1).tolist())
        if self._always_matched and any(token in raw for token in self._always_matched):
            plain |= {place for place, text in enumerate(texts) if any(token in text for token in self._always_matched)}
        gone = np.flatnonzero(~alive)
        bounds = (bounds - np.searchsorted(gone, bounds)).tolist()
        ids = tokens[alive]
        return [None if i in plain else ids[bounds[i] : bounds[i + 1]] for i in range(len(texts))]

    def _piece_bounds(self, raw: bytes, text_bounds: np.ndarray) -> np.ndarray:
        """[pieces + 1] places at which the text is cut."""
        size = int(text_bounds[-1])
        before = np.frombuffer(raw.translate(self._cut_before), dtype=np.uint8, count=size)
        after = np.frombuffer(raw.translate(self._cut_after), dtype=np.uint8, count=size)
        cut = np.ones(size + 1, dtype=bool)
        np.not_equal(before[:-1] & after[1:], 0, out=cut[1:-1])
        cut[text_bounds] = True
        return np.flatnonzero(cut)

    def _numbers(self, raw: bytes, bounds: np.ndarray) -> np.ndarray:
        """[pieces] number of each in the memory, where the new ones are put."""
        text = np.frombuffer(raw, dtype=np.uint8)
        starts, sizes = bounds[:-1], np.diff(bounds)
        keys = short_keys(text, starts, np.minimum(sizes, SHORT_BYTES))
        numbers = self._memory.find(keys)
        long = np.flatnonzero(sizes > SHORT_BYTES)
        numbers[long] = self._refused_number
        new = np.flatnonzero(numbers < 0)
        numbers[new], examples = self._memory.add(keys[:, new])
        learn = [new[examples]]
        for place in long[sizes[long] <= LONGEST_PIECE].tolist():
            piece = raw[bounds[place] : bounds[place + 1]]
            number = self._memory.long.get(piece)
            if number is None:
                number = self._memory.add_long(piece)
                learn.append(np.array([place]))
            numbers[place] = number
        places = np.concatenate(learn)
        if len(places):
            self._memory.set_ids(*self._merge_inside(raw, starts[places], sizes[places]))
        return numbers

    def _merge_inside(self, raw: bytes, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of pieces after the merges below T, one after another, and how many each has."""
        firsts = np.cumsum(sizes) - sizes
        total = int(sizes.sum())
        text = np.frombuffer(raw, dtype=np.uint8)[np.repeat(starts - firsts, sizes) + np.arange(total)]
        cut = np.zeros(total, dtype=bool)
        cut[firsts] = True
        # A piece of ASCII with a digit consists of digits.
        to_end = np.repeat(firsts + sizes, sizes) - np.arange(total)
        cut |= (text >= ord("0")) & (text <= ord("9")) & (to_end % 3 == 0)
        refused, apart = [], []
        for place in np.flatnonzero(np.maximum.reduceat(text, firsts) >= 0x80).tolist():
            piece = raw[starts[place] : starts[place] + sizes[place]]
            first = int(firsts[place])
            cut[first + 1 : first + len(piece)] = False
            if _may_be_number_beyond_ascii(piece.decode()):
                refused.append(first)
            else:
                apart += [first + group.start() for group in _DIGIT_GROUPS.finditer(piece) if group.start()]
        cut[apart] = True
        ids = self._byte_ids[text]
        alive = self._merges.merge(ids, np.flatnonzero(cut), 0, self._first_crossing)
        ids[apart] += CUT_BEFORE
        ids[refused] = REFUSED
        return ids[alive], np.add.reduceat(alive, firsts, dtype=np.int64)

    def _join(self, tokens: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The merges from T on, in place, none across `bounds`: which tokens are left, and where runs begin that are too long."""
        alive = np.ones(len(tokens), dtype=bool)
        joined = np.zeros(len(tokens) + 1, dtype=bool)  # To the token before.
        joined[1:-1] = self._may_join[_join_places(tokens[:-1], tokens[1:])]
        joined[bounds] = False
        member = joined[:-1] | joined[1:]
        starts = np.flatnonzero(member & ~joined[:-1])
        ends = np.flatnonzero(member & ~joined[1:]) + 1
        long = ends - starts > LONGEST_RUN
        for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
            member[start:end] = False
        run_tokens = tokens[member]
        sizes = (ends - starts)[~long]
        if len(sizes):
            left = self._merges.merge(run_tokens, np.cumsum(sizes) - sizes, self._first_crossing, MOST_IDS)
            tokens[member] = run_tokens
            alive[member] = left
        return alive, starts[long]

    def _forget(self) -> None:
        self._memory.clear()
        self._refused_number = self._memory.add_long(b"")
        self._memory.set_ids(np.array([REFUSED]), np.array([1]))


def _may_be_number_beyond_ascii(piece: str) -> bool:
    """Whether the pre-tokenizer may cut a piece elsewhere than beside ASCII digits.

    Characters that Python's Unicode tables do not know may be digits in the library's.
    """
    return any(unicodedata.category(character) in ("Nd", "Nl", "No", "Cn") for character in piece if character >= "\x80")


def _first_crossing(contents: Sequence[bytes], borders: re.Pattern[bytes]) -> int:
    return next((rank for rank, content in enumerate(contents) if borders.search(content)), len(contents))


def _cut_tables(punctuation: str) -> tuple[bytes, bytes]:
    """For `bytes.translate`: text is cut between two bytes if the first's value in the one and the second's in the other share a bit."""
    kinds = [_LETTERS, punctuation, _BLANKS, _DIGITS, r"\x00-\x7f"]
    members = [set(re.findall(f"[{kind}]".encode(), bytes(range(256)))) for kind in kinds]
    digit, ascii_characters = members[3], members[4]
    pairs = [(members[kinds.index(left)], members[kinds.index(right)]) for left, right in _border_pairs(punctuation)]
    pairs += [(digit, ascii_characters - digit), (ascii_characters - digit, digit)]
    before, after = bytearray(256), bytearray(256)
    for bit, (left, right) in enumerate(pairs):
        for byte in left:
            before[byte[0]] |= 1 << bit
        for byte in right:
            after[byte[0]] |= 1 << bit
    return bytes(before), bytes(after)


def _join_places(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where to find in `_may_join` whether two tokens may be joined. Other pairs in the same place only make runs longer."""
    mixed = left.astype(np.uint32) * np.uint32(0x9E3779B1) + right.astype(np.uint32) * np.uint32(0x85EBCA6B)
    return mixed >> np.uint32(32 - JOIN_BITS)
