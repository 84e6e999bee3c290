"""The header of a GGUF file, walked before gguf's reader follows it: the reader believes every count and offset that it finds.

Layout (ggml's GGUF specification, version 3, little-endian): magic, version, counts of tensors and of pairs; each pair a key, a type
and a value; each tensor a name, its sizes from the innermost on, a type and an offset behind the padded header.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

from yxanul_nemo.errors import UserError

MOST_TENSORS = 1 << 14
MOST_PAIRS = 1 << 12
MOST_ITEMS = 1_200_000
"""Most elements of all arrays: those of a vocabulary of 262,000 with its merges. gguf's reader takes 600 bytes of memory for each."""
MOST_TEXT_BYTES = 1 << 16
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> bytes; 8 is text and 9 an array."""
_TEXT, _ARRAY = 8, 9
_NUMBER_BYTES = {0: 4, 1: 2, 30: 2}
"""Type of a tensor that is taken (F32, F16, BF16) -> bytes of a number."""


def require_gguf(path: Path) -> None:
    """Refuse a file whose header does not lie within it, or names other tensors than plain ones.

    Raises:
        UserError: names what is wrong.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(path, data).walk()
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(path, f"is damaged ({error})", "a GGUF file by stage=export") from None


class _Header:
    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data = path, data
        self.place = self.items = 0
        self.alignment = 32

    def refuse(self, problem: str) -> NoReturn:
        raise UserError(self.path, problem, "a GGUF file by stage=export", "Export the model again.")

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return values

    def skip(self, size_bytes: int) -> None:
        self.place += size_bytes
        if self.place > len(self.data):
            self.refuse("is cut off")

    def text(self) -> bytes:
        (size_bytes,) = self.take("<Q")
        if size_bytes > MOST_TEXT_BYTES:
            self.refuse(f"has a text of {size_bytes:,} bytes")
        begin = self.place
        self.skip(size_bytes)
        return self.data[begin : self.place]

    def walk(self) -> None:
        magic, version, tensors, pairs = self.take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            self.refuse("is no GGUF file of version 3")
        if tensors > MOST_TENSORS or pairs > MOST_PAIRS:
            self.refuse(f"has {tensors:,} tensors and {pairs:,} pairs")
        for _ in range(pairs):
            key = self.text()
            (kind,) = self.take("<I")
            if key == b"general.alignment" and kind == 4:
                (self.alignment,) = struct.unpack_from("<I", self.data, self.place)
                if not 1 <= self.alignment <= 1 << 16:
                    self.refuse(f"has an alignment of {self.alignment:,} bytes")
            self.value(kind)
        found = [self.tensor() for _ in range(tensors)]
        begin = -(-self.place // self.alignment) * self.alignment
        if any(begin + offset + size_bytes > len(self.data) for offset, size_bytes in found):
            self.refuse("is cut off")

    def value(self, kind: int) -> None:
        if kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        elif kind == _TEXT:
            self.text()
        elif kind == _ARRAY:
            inner, count = self.take("<IQ")
            self.items += count
            if self.items > MOST_ITEMS:
                self.refuse(f"has arrays of {self.items:,} elements")
            if inner in _SCALAR_BYTES:
                self.skip(_SCALAR_BYTES[inner] * count)
            elif inner == _TEXT:
                for _ in range(count):
                    self.text()
            else:
                self.refuse(f"has an array of values of type {inner}")
        else:
            self.refuse(f"has a value of type {kind}")

    def tensor(self) -> tuple[int, int]:
        """Offset and size in bytes."""
        name = self.text().decode(errors="replace")
        (dimensions,) = self.take("<I")
        if not 1 <= dimensions <= 4:
            self.refuse(f"has '{name[:80]}' of {dimensions} dimensions")
        sizes = self.take(f"<{dimensions}Q")
        kind, offset = self.take("<IQ")
        if kind not in _NUMBER_BYTES:
            self.refuse(f"has '{name[:80]}' of type {kind}")
        return offset, math.prod(sizes) * _NUMBER_BYTES[kind]
