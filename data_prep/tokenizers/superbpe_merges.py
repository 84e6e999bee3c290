"""The second stage of SuperBPE training: byte-pair merges over a stream of tokens, across words, under rules on the merged token.

Every rule is a property of the pair alone (how many words, text after a newline or colon, digits), so a pair is either always
allowed or never. The merges are therefore exactly those of greedy BPE over the allowed pairs: nothing is cut out of the text
(which would hide alignments) and nothing is dropped afterwards (which would leave other merges counted wrongly).

Occurrences of a pair come into being at one moment, when the younger of its two tokens is made, and only become fewer after it.
So each pair keeps the positions found then, a heap holds counts that are right or too high, and the count is put right when a
pair comes to the top. Work per merge is a few NumPy operations over the positions of that merge.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SEPARATOR = -1
"""In the stream of ids: nothing merges across it (ends of documents, digits)."""
_MERGED_AWAY = -2
_WHITESPACE = b" \t\n\r\v\f"


@dataclass(frozen=True)
class MergeRules:
    """Which tokens may become one."""

    max_words: int = 4
    """Longest token, in words: runs of bytes without whitespace, whole or cut off."""
    cross_newline: bool = False
    """Allow text after a newline within a token. False: a newline and the indentation after it end a token."""
    cross_colon: bool = False
    """Allow ': text' within a token. False, as in the released tokenizers: 'Answer: yes' never hides its colon."""


class _TokenTraits:
    """What the rules ask about each token, as arrays over ids with room for `capacity` tokens."""

    def __init__(self, token_bytes: Sequence[bytes], capacity: int, rules: MergeRules):
        self.rules = rules
        self.words = np.zeros(capacity, dtype=np.int32)
        self.digits, self.has_text, self.starts_blank, self.ends_blank, self.open_newline, self.open_colon = (
            np.zeros(capacity, dtype=bool) for _ in range(6)
        )
        for number, content in enumerate(token_bytes):
            self.put(number, content)

    def put(self, number: int, content: bytes) -> None:
        self.words[number] = len(content.split())
        self.digits[number] = content.isdigit()
        self.has_text[number] = bool(content.strip())
        self.starts_blank[number] = content[0] in _WHITESPACE
        self.ends_blank[number] = content[-1] in _WHITESPACE
        self.open_newline[number] = b"\n" in content or b"\r" in content
        self.open_colon[number] = content.rstrip().endswith(b":")

    def allowed(self, left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
        """Whether each pair may merge; ids broadcast against each other."""
        apart = self.ends_blank[left] | self.starts_blank[right]
        joined = self.has_text[left] & self.has_text[right] & ~apart
        allowed = self.words[left] + self.words[right] - joined <= self.rules.max_words
        allowed &= ~(self.digits[left] | self.digits[right])
        if not self.rules.cross_newline:
            allowed &= ~(self.open_newline[left] & self.has_text[right])
        if not self.rules.cross_colon:
            allowed &= ~(self.open_colon[left] & apart & self.has_text[right])
        return allowed


class _Candidates:
    """Pairs with their positions, taken out by falling count.

    Only pairs with at least `floor` occurrences are in the heap; the many rare ones wait in arrays until the floor comes down to
    them, which for most never happens. Equal counts come out by smaller pair, so the result depends on the text alone.
    """

    def __init__(self, min_count: int):
        self.min_count = min_count
        self.floor = 1 << 62
        self._heap: list[tuple[int, int, np.ndarray]] = []
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, positions: np.ndarray) -> None:
        """Add new pairs: the key of each occurrence and where it is, positions ascending."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        counts = np.diff(starts, append=len(keys))
        kept = counts >= self.min_count
        if kept.any():
            self._waiting.append(self._release(keys[starts[kept]], counts[kept], starts[kept], positions))

    def _release(
        self, keys: np.ndarray, counts: np.ndarray, starts: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Move the pairs that reach the floor into the heap and give back the rest."""
        ready = counts >= self.floor
        for key, count, start in zip(keys[ready].tolist(), counts[ready].tolist(), starts[ready].tolist(), strict=True):
            heapq.heappush(self._heap, (-count, key, positions[start : start + count]))
        return keys[~ready], counts[~ready], starts[~ready], positions

    def put_back(self, key: int, positions: np.ndarray) -> None:
        """Return a pair whose count turned out lower."""
        if len(positions) >= self.min_count:
            heapq.heappush(self._heap, (-len(positions), key, positions))

    def pop(self) -> tuple[int, int, np.ndarray] | None:
        """Count (never too low), key and positions of the most frequent pair; None when no pair is left."""
        while not self._heap or -self._heap[0][0] < self.floor:
            highest = max((int(counts.max()) for _, counts, _, _ in self._waiting if len(counts)), default=0)
            if self._heap:
                highest = max(highest, -self._heap[0][0])
            if highest < self.min_count:
                return None
            self.floor = max(self.min_count, min(highest, self.floor) // 2)
            self._waiting = [left for entry in self._waiting if len((left := self._release(*entry))[0])]
        count, key, positions = heapq.heappop(self._heap)
        return -count, key, positions


def learn_merges(
    ids_N: np.ndarray,
    token_bytes: Sequence[bytes],
    count: int,
    rules: MergeRules,
    min_count: int = 2,
    progress: Callable[[int], None] = lambda merges: None,
) -> list[tuple[int, int]]:
    """Greedy byte-pair merges of a token stream.

    Args:
        ids_N: the text as ids below len(token_bytes), with SEPARATOR where nothing may merge; changed in place.
        token_bytes: bytes of each token there is.
        count: merges wanted. Merge number i makes the token len(token_bytes) + i.
        rules: which tokens may become one.
        min_count: pairs that occur less often are not merged.
        progress: called with the number of merges made, now and then.

    Returns:
        Pairs of ids, in order; fewer than `count` if the text has no more pairs that occur `min_count` times.
    """
    first_new, capacity = len(token_bytes), len(token_bytes) + count
    traits = _TokenTraits(token_bytes, capacity, rules)
    known = set(token_bytes)
    contents = list(token_bytes)
    n = len(ids_N)
    assert n < 2**31 - 2, "positions are int32"
    # One separator after the end serves as the neighbour of both ends.
    token = np.append(ids_N.astype(np.int32, copy=False), np.int32(SEPARATOR))
    after = np.arange(1, n + 2, dtype=np.int32)
    after[n] = n
    before = np.arange(-1, n, dtype=np.int32)
    before[0] = n
    candidates = _Candidates(min_count)

    def offer(positions: np.ndarray) -> None:
        """Add the pairs that start at these places."""
        left, right = token[positions], token[after[positions]]
        inside = (left >= 0) & (right >= 0)
        positions, left, right = positions[inside], left[inside], right[inside]
        fine = traits.allowed(left, right)
        candidates.add(left[fine].astype(np.int64) * capacity + right[fine], positions[fine])

    offer(np.arange(n, dtype=np.int32))
    merges: list[tuple[int, int]] = []
    while len(merges) < count and (best := candidates.pop()) is not None:
        claimed, key, at = best
        left, right = divmod(key, capacity)
        at = at[(token[at] == left) & (token[after[at]] == right)]
        if left == right:
            at = _every_other(at, after)
        if len(at) < claimed:
            candidates.put_back(key, at)
            continue
        content = contents[left] + contents[right]
        if content in known:
            # An encoder knows tokens by their text: it would take this for the other token and go on from there by merges
            # of lower rank, which the stream here would not follow.
            continue
        made = first_new + len(merges)
        merges.append((left, right))
        contents.append(content)
        known.add(content)
        traits.put(made, content)
        gone = after[at]
        beyond = after[gone]
        token[at] = made
        token[gone] = _MERGED_AWAY
        after[at] = beyond
        before[beyond] = at
        preceding = before[at]
        # A pair of two new tokens is found from its left one; only there, so that it counts once.
        offer(at)
        offer(preceding[token[preceding] != made])
        if len(merges) % 64 == 0:
            progress(len(merges))
    progress(len(merges))
    return merges


def _every_other(at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of the places of a pair of equal tokens, those that a left-to-right reading merges: in 'a a a' the first, not the second."""
    if len(at) < 2:
        return at
    starts_run = np.concatenate(([True], after[at[:-1]] != at[1:]))
    run_start = np.maximum.accumulate(np.where(starts_run, np.arange(len(at)), 0))
    return at[(np.arange(len(at)) - run_start) % 2 == 0]
