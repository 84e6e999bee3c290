"""Byte-pair merges of many short sequences at once, with numpy.

One round merges one pair in each sequence that has one to merge: the pair of lowest rank, of equal ones the leftmost. That is what
byte-pair encoding does to each sequence by itself, so the result is the same; a round costs a few passes over arrays for all
sequences together.
"""

import numpy as np

ID_BITS = 20
"""A pair of ids and the rank of its merge share one number of 64 bits."""
MOST_IDS = 1 << ID_BITS
_SLOTS_PER_MERGE = 3
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_NEVER = np.int64(1) << 62


class PairMerges:
    """The merges of a vocabulary: an open hash table from a pair of ids to its rank, and the id that each rank makes."""

    def __init__(self, left: np.ndarray, right: np.ndarray, made: np.ndarray):
        """Merge k joins the ids `left[k]` and `right[k]` to `made[k]`; no pair occurs twice. All ids are below `MOST_IDS`."""
        assert len(left) < MOST_IDS and max(left.max(), right.max(), made.max()) < MOST_IDS
        self.made = made.astype(np.int32)
        bits = int(len(left) * _SLOTS_PER_MERGE).bit_length()
        self._shift = np.uint64(64 - bits)
        self._slots = np.zeros(1 << bits, dtype=np.uint64)
        self._mask = (1 << bits) - 1
        pairs = _pairs(left, right)
        entries = (pairs << np.uint64(ID_BITS)) | np.arange(1, len(left) + 1, dtype=np.uint64)  # 0 marks an empty slot.
        slots = self._first_slots(pairs)
        waiting = np.arange(len(entries))
        while len(waiting):
            free = waiting[self._slots[slots[waiting]] == 0]
            self._slots[slots[free]] = entries[free]
            waiting = waiting[self._slots[slots[waiting]] != entries[waiting]]
            slots[waiting] = (slots[waiting] + 1) & self._mask

    def ranks(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """[pairs] rank of each pair's merge, int64; -1 for pairs that are never merged."""
        pairs = _pairs(left, right)
        slots = self._first_slots(pairs)
        entries = self._slots[slots]
        found = (entries & np.uint64(MOST_IDS - 1)).astype(np.int64) - 1
        other = np.flatnonzero((entries >> np.uint64(ID_BITS)) != pairs)
        found[other] = -1
        other = other[entries[other] != 0]
        while len(other):
            slots[other] = (slots[other] + 1) & self._mask
            entries = self._slots[slots[other]]
            same = (entries >> np.uint64(ID_BITS)) == pairs[other]
            found[other[same]] = (entries[same] & np.uint64(MOST_IDS - 1)).astype(np.int64) - 1
            other = other[~same & (entries != 0)]
        return found

    def merge(self, ids: np.ndarray, starts: np.ndarray, first_rank: int, end_rank: int) -> np.ndarray:
        """Apply the merges of ranks from `first_rank` to below `end_rank` inside each sequence, in place.

        Args:
            ids: [total] the sequences one after another, int32; those that are left stand where their leftmost part stood.
            starts: [sequences] where each begins, ascending, the first at 0.

        Returns:
            [total] which places still hold an id, bool.
        """
        total = len(ids)
        alive = np.ones(total, dtype=bool)
        if total < 2:
            return alive
        following = np.arange(1, total + 1)
        preceding = np.arange(-1, total - 1)
        # `order` sorts merges: rank first, then place. A sequence's last id has no pair; nor has what is merged into another.
        joined = np.ones(total, dtype=bool)
        joined[starts[1:] - 1] = False
        joined[-1] = False
        order = np.full(total, _NEVER)
        places = np.flatnonzero(joined)
        ranks = self.ranks(ids[places], ids[places + 1])
        possible = (ranks >= first_rank) & (ranks < end_rank)
        places = places[possible]
        order[places] = (ranks[possible] << 32) | places
        last_of = joined  # From here on: whether a place has a following one in its sequence.
        while True:
            least = np.minimum.reduceat(order, starts) if len(starts) else np.empty(0, dtype=np.int64)
            going = least < _NEVER
            starts, least = starts[going], least[going]
            if not len(starts):
                return alive
            place = least & 0xFFFFFFFF
            gone = following[place]
            ids[place] = self.made[least >> 32]
            alive[gone] = False
            order[gone] = _NEVER
            after = following[gone]
            following[place] = after
            has_after = last_of[gone]
            last_of[place] = has_after
            preceding[after[has_after]] = place[has_after]
            order[place] = _NEVER
            self._reorder(ids, order, place[has_after], after[has_after], first_rank, end_rank)
            before = preceding[place]
            has_before = (before >= 0) & last_of[before]
            self._reorder(ids, order, before[has_before], place[has_before], first_rank, end_rank)

    def _reorder(
        self, ids: np.ndarray, order: np.ndarray, left: np.ndarray, right: np.ndarray, first_rank: int, end_rank: int
    ) -> None:
        ranks = self.ranks(ids[left], ids[right])
        possible = (ranks >= first_rank) & (ranks < end_rank)
        order[left] = np.where(possible, (ranks << 32) | left, _NEVER)

    def _first_slots(self, pairs: np.ndarray) -> np.ndarray:
        return ((pairs * _FACTOR) >> self._shift).astype(np.int64)


def _pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left.astype(np.uint64) << np.uint64(ID_BITS)) | right.astype(np.uint64)
