"""A faster way to the same ids: SuperBPE's merges inside words from a memory of pieces, its merges across words on what is left.

Byte-pair encoding applies merges strictly by rank. With T and the conditions of `superword_tables`:

- merges below T never cross the borders of words, so text may be cut there and each piece encoded alone; pieces repeat, so most
  are found in a memory,
- merges from T on make tokens that no merge below T makes, so none that a merge below T takes: they can be applied afterwards,
  by themselves,
- a merge from T on joins two tokens across a border only if the two that meet there lie side by side in some token made from T on.
  Most do not, so that what is left falls into short runs,
- digit groups are cut off by the pre-tokenizer, and no merge from T on joins an ASCII digit to anything in ASCII.

Merging is `pair_merging`'s: all new pieces at once, all runs at once. Texts that this is not made for are left to the tokenizer itself.
"""

import re
import threading
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Self

import numpy as np
import tokenizers

from data_prep.tokenizers.pair_merging import MOST_IDS
from data_prep.tokenizers.piece_memory import SHORT_BYTES, PieceMemory, short_keys
from data_prep.tokenizers.superbpe_rules import GROUPS_OF_THREE
from data_prep.tokenizers.superword_tables import SuperwordTables, join_places

MEMORY_PIECES = 400_000
"""Pieces remembered; about 50 MB. A full memory starts anew."""
SLICE_BYTES = 1 << 20
"""Text worked on at a time: its arrays take some 20 MB. It must hold fewer new pieces than the memory has room for beside the others."""
LONGEST_PIECE = 256
"""Bytes of the longest piece that is taken. Work grows with the square of a piece's length."""
LONGEST_RUN = 64
"""Tokens of the longest run that is taken, for the same reason."""
REFUSED = -1
"""Stands for the ids of a piece that is not taken."""
CUT_BEFORE = 1 << 24
"""Added to the id of a token that the pre-tokenizer keeps apart from the one before it."""

_GROUP_BORDERS = re.compile(GROUPS_OF_THREE)


class SuperwordEncoder:
    """Encodes as the tokenizer it was made for; threads may share it, and wait for each other. Pickled without its memory."""

    @classmethod
    def for_tokenizer(cls, tokenizer: tokenizers.Tokenizer) -> Self | None:
        """The encoder, or None if the tokenizer does not meet the conditions."""
        tables = SuperwordTables.for_tokenizer(tokenizer)
        return None if tables is None else cls(tables)

    def __init__(self, tables: SuperwordTables):
        self._tables = tables
        self._lock = threading.Lock()
        self._memory = PieceMemory()
        self._forget()

    def __reduce__(self) -> tuple[type["SuperwordEncoder"], tuple[SuperwordTables]]:
        return SuperwordEncoder, (self._tables,)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Ids of each text, int32 of shape [tokens]; None for those that are left to the tokenizer: in scripts without spaces and
        ASCII punctuation, with unassigned characters, with tokens that are found before any merging, or longer than `SLICE_BYTES`.
        """
        results: list[np.ndarray | None] = []
        held: list[bytes] = []
        size = 0
        with self._lock:
            for raw in map(str.encode, texts):
                if size + len(raw) > SLICE_BYTES:
                    results += self._encode_slice(held)
                    held, size = [], 0
                if len(raw) > SLICE_BYTES:
                    results.append(None)
                else:
                    held.append(raw)
                    size += len(raw)
            return results + self._encode_slice(held)

    def _encode_slice(self, texts: list[bytes]) -> list[np.ndarray | None]:
        if len(self._memory) > MEMORY_PIECES:
            self._forget()
        text_bounds = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=text_bounds[1:])
        raw = b"".join([*texts, bytes(SHORT_BYTES + 1)])
        piece_bounds = self._piece_bounds(raw, text_bounds)
        tokens, token_bounds = self._memory.ids(self._numbers(raw, piece_bounds))
        bounds = token_bounds[np.searchsorted(piece_bounds, text_bounds)]
        special = np.flatnonzero(tokens.view(np.uint32) >= CUT_BEFORE)  # REFUSED is above it, too.
        refused, apart = special[tokens[special] == REFUSED], special[tokens[special] != REFUSED]
        tokens[refused] = 0
        tokens[apart] -= CUT_BEFORE
        alive, long_runs = self._join(tokens, np.concatenate([bounds, apart]))
        left_out = np.searchsorted(bounds, np.concatenate([refused, long_runs]), side="right") - 1
        others = set(left_out.tolist())
        if any(token in raw for token in self._tables.always_matched):
            others |= {i for i, text in enumerate(texts) if any(token in text for token in self._tables.always_matched)}
        ids = tokens[alive]
        bounds = (bounds - np.searchsorted(np.flatnonzero(~alive), bounds)).tolist()
        return [None if i in others else ids[bounds[i] : bounds[i + 1]] for i in range(len(texts))]

    def _piece_bounds(self, raw: bytes, text_bounds: np.ndarray) -> np.ndarray:
        """[pieces + 1] places at which the text is cut."""
        size = int(text_bounds[-1])
        before = np.frombuffer(raw.translate(self._tables.cut_before), dtype=np.uint8)
        after = np.frombuffer(raw.translate(self._tables.cut_after), dtype=np.uint8)
        cut = np.zeros(size + 1, dtype=bool)
        if size:
            np.not_equal(before[: size - 1] & after[1:size], 0, out=cut[1:-1])
        cut[text_bounds] = True
        return np.flatnonzero(cut)

    def _numbers(self, raw: bytes, bounds: np.ndarray) -> np.ndarray:
        """[pieces] number of each in the memory, where the new ones are put."""
        starts, sizes = bounds[:-1], np.diff(bounds)
        keys = short_keys(np.frombuffer(raw, dtype=np.uint8), starts, np.minimum(sizes, SHORT_BYTES))
        numbers = self._memory.find(keys)
        long = np.flatnonzero(sizes > SHORT_BYTES)
        numbers[long] = self._refused_number
        new = np.flatnonzero(numbers < 0)
        numbers[new], examples = self._memory.add(keys[:, new])
        learned = new[examples].tolist()
        for place in long[sizes[long] <= LONGEST_PIECE].tolist():
            piece = raw[bounds[place] : bounds[place + 1]]
            number = self._memory.long.get(piece)
            if number is None:
                number = self._memory.add_long(piece)
                learned.append(place)
            numbers[place] = number
        if learned:
            self._memory.set_ids(*self._merge_inside(raw, starts[learned], sizes[learned]))
        return numbers

    def _merge_inside(self, raw: bytes, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of pieces after the merges below T, one after another, and how many each has."""
        firsts = np.cumsum(sizes) - sizes
        places = np.arange(int(sizes.sum()))
        text = np.frombuffer(raw, dtype=np.uint8)[np.repeat(starts - firsts, sizes) + places]
        # A piece of ASCII with a digit consists of digits: groups of three from its end.
        cut = (text >= ord("0")) & (text <= ord("9")) & ((np.repeat(firsts + sizes, sizes) - places) % 3 == 0)
        cut[firsts] = True
        refused, apart = [], []
        for number in np.flatnonzero(np.maximum.reduceat(text, firsts) >= 0x80).tolist():
            piece = raw[starts[number] : starts[number] + sizes[number]]
            first = int(firsts[number])
            cut[first + 1 : first + len(piece)] = False
            cuts = _number_cuts(piece.decode())
            if cuts is None:
                refused.append(first)
            else:
                apart += [first + place for place in cuts]
        cut[apart] = True
        ids = self._tables.byte_ids[text]
        alive = self._tables.merges.merge(ids, np.flatnonzero(cut), 0, self._tables.first_crossing)
        ids[apart] += CUT_BEFORE
        ids[refused] = REFUSED
        return ids[alive], np.add.reduceat(alive, firsts, dtype=np.int64)

    def _join(self, tokens: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The merges from T on, in place, none between a token of `apart` and the one before it: which tokens are left, and where
        runs begin that are too long to be taken.
        """
        alive = np.ones(len(tokens), dtype=bool)
        joined = np.zeros(len(tokens) + 1, dtype=bool)  # To the token before.
        joined[1:-1] = self._tables.may_join[join_places(tokens[:-1], tokens[1:])]
        joined[apart] = False
        in_run = joined[:-1] | joined[1:]
        starts = np.flatnonzero(in_run & ~joined[:-1])
        sizes = np.flatnonzero(in_run & ~joined[1:]) + 1 - starts
        long = sizes > LONGEST_RUN
        for start, size in zip(starts[long].tolist(), sizes[long].tolist(), strict=True):
            in_run[start : start + size] = False
        runs, sizes = tokens[in_run], sizes[~long]
        alive[in_run] = self._tables.merges.merge(runs, np.cumsum(sizes) - sizes, self._tables.first_crossing, MOST_IDS)
        tokens[in_run] = runs
        return alive, starts[long]

    def _forget(self) -> None:
        self._memory.clear()
        self._refused_number = self._memory.add_long(b"")
        self._memory.set_ids(np.array([REFUSED]), np.array([1]))


def _number_cuts(piece: str) -> list[int] | None:
    """Bytes of a piece before each place where the pre-tokenizer cuts it; None if that is not known.

    Characters that Python's Unicode tables do not know may be digits in the library's.
    """
    categories = [unicodedata.category(character) for character in piece]
    if "Cn" in categories:
        return None
    cuts, place = [], 0
    for is_number, run in groupby(zip(categories, piece, strict=True), key=lambda pair: pair[0][0] == "N"):
        text = "".join(character for _, character in run)
        cuts.append(place)
        if is_number:
            cuts += [place + len(text[: border.start()].encode()) for border in _GROUP_BORDERS.finditer(text, 1)]
        place += len(text.encode())
    return cuts[1:]
