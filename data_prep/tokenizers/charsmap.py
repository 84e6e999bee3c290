"""Sentencepiece's table of characters to replace (`precompiled_charsmap`), walked once as its readers walk it.

Layout: the size in bytes of a double array (u32, little-endian), the array (Darts-clone's: units of u32), then the replacements as
texts that end with a zero byte. Neither sentencepiece nor `tokenizers` looks whether what a unit points to is there.
"""

import numpy as np

MAX_CHARSMAP_BYTES = 2 << 20
MOST_KEY_BYTES = 32
"""Longest text that is replaced as one: sentencepiece keeps as many results of one search."""
_LABEL = np.uint32(0x800000FF)


def charsmap_growth(charsmap: bytes) -> float:
    """Return the largest factor by which a replacement is longer than what it replaces, in bytes, at least 1.

    Raises:
        ValueError: the table is damaged: a search in it would leave it, or never end.
    """
    size_bytes = int.from_bytes(charsmap[:4], "little")
    if not 4 <= len(charsmap) <= MAX_CHARSMAP_BYTES or size_bytes % 1024 or not 1024 <= size_bytes < len(charsmap) - 4:
        raise ValueError("sizes do not fit")
    units = np.frombuffer(charsmap, dtype="<u4", count=size_bytes // 4, offset=4)
    texts = charsmap[4 + size_bytes :]
    if texts[-1] != 0:
        raise ValueError("the last replacement has no end")
    ends = np.flatnonzero(np.frombuffer(texts, dtype=np.uint8) == 0)
    letters = np.arange(1, 256, dtype=np.int64)
    states, walked, growth = _offsets(units[:1]), 0, 1.0
    for length in range(1, MOST_KEY_BYTES + 2):
        # Keys may share their ends, and so their states.
        states = np.unique(states)
        walked += len(states)
        if (int(states.max()) | 255) >= len(units) or walked > 4 * len(units):
            raise ValueError("a search would leave it, or never end")
        # The array comes in blocks of 256, so that a letter leads from a state to another place of its block.
        places = (states[:, None] ^ letters).ravel()
        found = units[places]
        places = places[(found & _LABEL) == np.tile(letters, len(states)).astype(np.uint32)]
        if not len(places):
            return growth
        states = places ^ _offsets(units[places])
        whole = states[(units[places] >> 8 & 1) == 1]
        if whole.size:
            if int(states.max()) >= len(units):
                raise ValueError("a search would leave it")
            begins = (units[whole] & np.uint32(0x7FFFFFFF)).astype(np.int64)
            if int(begins.max()) >= len(texts):
                raise ValueError("a replacement lies outside of it")
            longest = int((ends[np.searchsorted(ends, begins)] - begins).max())
            growth = max(growth, longest / length)
    raise ValueError(f"it replaces texts of more than {MOST_KEY_BYTES} bytes")


def _offsets(units: np.ndarray) -> np.ndarray:
    wide = units.astype(np.int64)
    return (wide >> 10) << ((wide & (1 << 9)) >> 6)
