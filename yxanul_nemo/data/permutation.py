"""Permutations of 0 .. n - 1 that are computed where they are needed and stored nowhere."""

import hashlib
import math

import numpy as np

ROUNDS = 3
"""Rounds of the network, each of which changes both halves. Two are enough that a few values of a permutation cannot be told from random
ones (Luby and Rackoff, SIAM J. Comput. 17(2), 1988)."""


class KeyedPermutation:
    """A permutation of 0 .. size - 1 that follows from a key alone: any element is found without the others, in constant memory.

    It is a Feistel network over pairs (left, right) of numbers below about the root of `size`, with additions modulo their ranges, repeated
    for the few pairs that lie outside 0 .. size - 1 (Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002). The arithmetic
    is written out here so that no version of a library can change the order in which a run reads its data.

    Args:
        size: number of elements, at least 1.
        key: what the permutation depends on; texts and whole numbers.
    """

    def __init__(self, size: int, *key: str | int):
        assert size >= 1, "there is nothing to permute"
        self.size = size
        self._left_range = math.isqrt(size - 1) + 1
        self._right_range = -(-size // self._left_range)
        digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16 * ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Return the elements [n] int64 at the places `indices` [n], each in 0 .. size - 1."""
        out = self._permute_pairs(indices.astype(np.uint64))
        outside = np.flatnonzero(out >= self.size)
        while len(outside):
            out[outside] = self._permute_pairs(out[outside])
            outside = outside[out[outside] >= self.size]
        return out.astype(np.int64)

    def _permute_pairs(self, numbers: np.ndarray) -> np.ndarray:
        """Permute 0 .. left range * right range - 1."""
        left_range, right_range = np.uint64(self._left_range), np.uint64(self._right_range)
        left, right = np.divmod(numbers, right_range)
        for key_of_left, key_of_right in self._round_keys.reshape(ROUNDS, 2):
            left += _hash_below(left_range, right, key_of_left)
            left -= left_range * (left >= left_range)
            right += _hash_below(right_range, left, key_of_right)
            right -= right_range * (right >= right_range)
        return left * right_range + right


def _hash_below(limit: np.uint64, values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hash [n] uint64 to 0 .. limit - 1, for limits below 2**32.

    The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); its products wrap around on purpose. The upper half
    of a hash is scaled to the limit (Lemire, ACM TOMACS 29(1), 2019), which is faster than a remainder.
    """
    x = values * np.uint64(0x9E3779B97F4A7C15)
    x += key
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(32)
    x *= limit
    x >>= np.uint64(32)
    return x
