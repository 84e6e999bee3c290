"""What pieces of text are encoded to: a hash table in which many pieces are looked up at once, with numpy."""

import numpy as np

SHORT_BYTES = 15
"""A piece of up to so many bytes is its own key of 128 bits, together with its size; longer ones are looked up one by one."""
SLOT_BITS = 20
_SLOT_MASK = (1 << SLOT_BITS) - 1
_FACTORS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
_SHIFT = np.uint64(64 - SLOT_BITS)
_LOW_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)
_EMPTY = -1


def short_keys(text: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[2, pieces] uint64: the bytes of each piece, and in the last one how many they are.

    `text` (uint8) must go on for 16 bytes after the last start; sizes are from 1 to `SHORT_BYTES`.
    """
    words = np.ndarray(len(text) - 7, dtype="<u8", buffer=text, strides=(1,))
    keys = np.empty((2, len(starts)), dtype=np.uint64)
    keys[0] = words[starts] & _LOW_BYTES[np.minimum(sizes, 8)]
    keys[1] = words[starts + 8] & _LOW_BYTES[np.maximum(sizes - 8, 0)]
    keys[1] |= sizes.astype(np.uint64) << np.uint64(56)
    return keys


class PieceMemory:
    """Numbers for pieces, and the ids of each."""

    def __init__(self) -> None:
        self._keys = np.zeros((2, 1 << SLOT_BITS), dtype=np.uint64)
        self._numbers = np.full(1 << SLOT_BITS, _EMPTY, dtype=np.int32)
        self.clear()

    def clear(self) -> None:
        """Forget all pieces."""
        self._keys.fill(0)
        self._numbers.fill(_EMPTY)
        self.long: dict[bytes, int] = {}
        self._count = self._held = 0
        self._ids = np.empty(1 << 16, dtype=np.int32)
        self._starts = np.empty(1 << 14, dtype=np.int64)
        self._sizes = np.empty(1 << 14, dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[pieces] number of each short piece, int32; -1 where it is not known."""
        slots = _first_slots(keys)
        numbers = self._numbers[slots]
        other = np.flatnonzero(self._differ(keys, slots))
        while len(other):
            other = other[numbers[other] != _EMPTY]
            slots[other] = (slots[other] + 1) & _SLOT_MASK
            numbers[other] = self._numbers[slots[other]]
            other = other[self._differ(keys[:, other], slots[other])]
        return numbers

    def add(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give numbers to short pieces that are not known, some of which may be equal; `set_ids` must follow.

        Returns [pieces] the number of each, and the places in `keys` of one example for each number, in the order of the numbers.
        """
        slots = _first_slots(keys)
        examples = [np.empty(0, dtype=np.int64)]
        waiting = np.arange(keys.shape[1])
        while len(waiting):
            free = waiting[self._numbers[slots[waiting]] == _EMPTY]
            offered = np.arange(len(free), dtype=np.int32)
            self._numbers[slots[free]] = offered  # Of several that want a slot, one gets it.
            first = free[self._numbers[slots[free]] == offered]
            self._numbers[slots[first]] = np.arange(self._count, self._count + len(first))
            self._keys[:, slots[first]] = keys[:, first]
            self._count += len(first)
            examples.append(first)
            waiting = waiting[self._differ(keys[:, waiting], slots[waiting])]
            slots[waiting] = (slots[waiting] + 1) & _SLOT_MASK
        return self._numbers[slots], np.concatenate(examples)

    def add_long(self, piece: bytes) -> int:
        """Give a number to a longer piece that is not known; `set_ids` must follow."""
        self.long[piece] = self._count
        self._count += 1
        return self._count - 1

    def set_ids(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Ids of the pieces that got the last numbers, one after another, and how many of them each has."""
        first = self._count - len(sizes)
        self._starts = _grown(self._starts, self._count)
        self._sizes = _grown(self._sizes, self._count)
        self._ids = _grown(self._ids, self._held + len(ids))
        self._ids[self._held : self._held + len(ids)] = ids
        self._sizes[first : self._count] = sizes
        self._starts[first : self._count] = self._held + np.cumsum(sizes) - sizes
        self._held += len(ids)

    def ids(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[total] ids of pieces one after another, int32, and [pieces + 1] where each one's begin."""
        sizes = self._sizes[numbers]
        bounds = np.zeros(len(numbers) + 1, dtype=np.int64)
        np.cumsum(sizes, out=bounds[1:])
        ids = np.empty(bounds[-1], dtype=np.int32)
        starts = self._starts[numbers]
        ids[bounds[:-1]] = self._ids[starts]
        place, more = 1, np.flatnonzero(sizes > 1)
        while len(more):
            ids[bounds[more] + place] = self._ids[starts[more] + place]
            place += 1
            more = more[sizes[more] > place]
        return ids, bounds

    def _differ(self, keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
        return (self._keys[0][slots] != keys[0]) | (self._keys[1][slots] != keys[1])


def _first_slots(keys: np.ndarray) -> np.ndarray:
    mixed = keys[0] * _FACTORS[0] + keys[1] * _FACTORS[1]
    return ((mixed ^ (mixed >> np.uint64(32))) * _FACTORS[0] >> _SHIFT).astype(np.int64)


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """`array`, or a copy with room for `size`."""
    if size <= len(array):
        return array
    larger = np.empty(max(size, 2 * len(array)), dtype=array.dtype)
    larger[: len(array)] = array
    return larger
