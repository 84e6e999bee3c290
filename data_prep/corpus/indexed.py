"""Megatron's indexed dataset (.bin/.idx), read and written without importing Megatron, whose import takes ten seconds.

Format, little-endian, as in `megatron/core/datasets/indexed_dataset.py` (Megatron-core 0.19): the .bin holds the token ids of
all documents one after another; the .idx holds the 9 bytes `MMIDIDX\\0\\0`, version 1 (u64), a code for the type of the ids (u8),
the number of sequences n (u64), the number of document bounds d (u64), n sequence lengths in tokens (i32), n byte offsets into
the .bin (i64) and d indices of sequences at which documents begin and the last one ends (i64). Files written here have one
sequence per document.
"""

import hashlib
import mmap
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from yxanul_nemo.errors import UserError
from yxanul_nemo.files import atomic_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[np.dtype, int] = {
    np.dtype(np.uint8): 1,
    np.dtype(np.int8): 2,
    np.dtype(np.int16): 3,
    np.dtype(np.int32): 4,
    np.dtype(np.int64): 5,
    np.dtype(np.uint16): 8,
}
TokenDtypeName = Literal["uint16", "int32"]
UINT16_VOCAB_LIMIT = 65500
"""Vocabularies below this size are stored as uint16, larger ones as int32: the rule of Megatron's `DType.optimal_dtype`."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores the ids of a vocabulary of this size."""
    return np.dtype(token_dtype_name(vocab_size))


def token_dtype_name(vocab_size: int) -> TokenDtypeName:
    """Return its name."""
    return "uint16" if vocab_size < UINT16_VOCAB_LIMIT else "int32"


def bin_path(path_prefix: Path) -> Path:
    """File with the token ids."""
    return Path(f"{path_prefix}.bin")


def idx_path(path_prefix: Path) -> Path:
    """File with the bounds of the documents."""
    return Path(f"{path_prefix}.idx")


@dataclass(frozen=True)
class WrittenPair:
    """What a finished .bin/.idx pair holds, and the SHA-256 of both files."""

    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class IndexedWriter:
    """Write documents to `path_prefix`.bin and .idx, byte for byte as Megatron's `IndexedDatasetBuilder.add_document` would.

    A context manager: both files appear under their names when the block ends (the .idx last), neither does if it raises.
    Memory: 4 bytes per document.
    """

    result: WrittenPair
    """Counts and digests of both files; there are none until the block has ended."""

    def __init__(self, path_prefix: Path, dtype: np.dtype):
        self.path_prefix = Path(path_prefix)
        self.dtype = np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._bin = self._stack.enter_context(atomic_file(bin_path(self.path_prefix)))
        return self

    def add_documents(self, documents: Sequence[np.ndarray]) -> int:
        """Append documents, each an array of ids that ends with the caller's EOS; returns the number of tokens."""
        lengths = np.fromiter((len(ids) for ids in documents), dtype=np.int64, count=len(documents))
        if not len(lengths):
            return 0
        if lengths.max() > np.iinfo(np.int32).max:
            raise OverflowError(f"a document of {lengths.max()} tokens does not fit the format's 32-bit lengths")
        flat = np.concatenate(documents)
        limits = np.iinfo(self.dtype)
        if len(flat) and (flat.min() < limits.min or flat.max() > limits.max):
            raise OverflowError(f"token ids {flat.min()}..{flat.max()} do not fit {self.dtype}")
        data = flat.astype(self.dtype.newbyteorder("<"), copy=False).data.cast("B")
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.append(lengths.astype(np.int32))
        self._tokens += len(flat)
        return len(flat)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._stack.__exit__(kind, error, trace) or kind is not None:
            return None
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        bounds = np.arange(len(lengths) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype], len(lengths), len(bounds))
        digest, idx_bytes = hashlib.sha256(), 0
        with atomic_file(idx_path(self.path_prefix)) as handle:
            for part in (header, lengths.astype("<i4").data, pointers.data, bounds.data):
                piece = memoryview(part).cast("B")
                handle.write(piece)
                digest.update(piece)
                idx_bytes += len(piece)
        self.result = WrittenPair(
            documents=len(lengths),
            tokens=self._tokens,
            bin_bytes=self._tokens * self.dtype.itemsize,
            idx_bytes=idx_bytes,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=digest.hexdigest(),
        )
        return None


class IndexedTokens:
    """A .bin/.idx pair, memory-mapped.

    Opening compares the index's header and its last document with both files' sizes, in constant time. The index as a whole is read
    and checked when documents are first asked for, since the sequence of all tokens needs no index.

    Raises UserError if a file is absent, cut short, damaged or of another kind.
    """

    tokens: np.ndarray
    """[tokens] ids of all documents in order, a view of the file."""
    dtype: np.dtype

    def __init__(self, path_prefix: Path | str):
        self.path_prefix = Path(path_prefix)
        self._header = _read_header(idx_path(self.path_prefix))
        self.dtype = self._header.dtype
        if self._header.tokens * self.dtype.itemsize != _size(bin_path(self.path_prefix)):
            # The index as a whole shows which of the two is damaged.
            _read_offsets(idx_path(self.path_prefix), self._header)
        self._map, self.tokens = _map_tokens(bin_path(self.path_prefix), self.dtype, self._header.tokens)

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """[documents + 1] int64: document i is tokens[document_offsets[i]:document_offsets[i + 1]]."""
        return _read_offsets(idx_path(self.path_prefix), self._header)

    def __len__(self) -> int:
        """Number of documents."""
        return self._header.document_bounds - 1

    def will_need(self, first_token: int, end_token: int) -> None:
        """Have the operating system begin to read tokens `first_token` .. `end_token` - 1 from the disk."""
        if self._map is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        begin, end = first_token * self.dtype.itemsize, end_token * self.dtype.itemsize
        begin -= begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def document(self, i: int) -> np.ndarray:
        """[length] ids of document i, a view of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.tokens[self.document_offsets[i] : self.document_offsets[i + 1]]

    def __reduce__(self) -> tuple[type["IndexedTokens"], tuple[Path]]:
        # Another process maps the files itself; the tokens are never copied into the pickle.
        return IndexedTokens, (self.path_prefix,)


def _damaged(path: Path, problem: str, expected: str = "") -> UserError:
    return UserError(
        path, problem, expected, "Make it again with `python launcher.py stage=data`, or restore it from a copy."
    )


@dataclass(frozen=True)
class _Header:
    """Facts about an .idx that its header and its last sequence tell."""

    dtype: np.dtype
    sequences: int
    document_bounds: int
    tokens: int
    """End of the last sequence."""


def _read_header(path: Path) -> _Header:
    """Read the header and the last sequence of an .idx, and compare them with its size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header = handle.read(HEADER.size)
            if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
                raise _damaged(path, f"begins with {header[:9]!r}", f"Megatron's index, which begins with {MAGIC!r}")
            if len(header) < HEADER.size:
                raise _damaged(path, f"ends after {len(header)} bytes, inside its header of {HEADER.size}")
            _, version, code, sequences, bounds = HEADER.unpack(header)
            dtype = _checked_dtype(path, version, code)
            _check_size(path, size, sequences, bounds)
            tokens = 0
            if sequences:
                handle.seek(HEADER.size + 4 * (sequences - 1))
                (length,) = struct.unpack("<i", handle.read(4))
                handle.seek(HEADER.size + 12 * sequences - 8)
                (pointer,) = struct.unpack("<q", handle.read(8))
                if length < 0:
                    raise _damaged(path, f"has a sequence of {length} tokens", "lengths of at least 0")
                if pointer < 0 or pointer % dtype.itemsize:
                    raise _damaged(path, "has sequences that do not lie one after another in the .bin")
                tokens = pointer // dtype.itemsize + length
    except FileNotFoundError:
        raise _damaged(path, "the file does not exist", "a .bin and an .idx side by side") from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})", "a readable file") from None
    return _Header(dtype, sequences, bounds, tokens)


def _checked_dtype(path: Path, version: int, code: int) -> np.dtype:
    if version != VERSION:
        raise _damaged(path, f"format version {version}", f"version {VERSION}")
    dtype = next((dtype for dtype, known in DTYPE_CODES.items() if known == code), None)
    if dtype is None:
        raise _damaged(path, f"type code {code}", f"a code of whole numbers ({sorted(DTYPE_CODES.values())})")
    return dtype


def _check_size(path: Path, size: int, sequences: int, bounds: int) -> None:
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if size == expected + sequences and sequences:
        raise _damaged(path, "is a multimodal index (it has a mode for each sequence)", "an index of text")
    if size != expected:
        raise _damaged(path, f"has {size} bytes", f"{expected} for {sequences} sequences and {bounds} document bounds")
    if bounds < 1:
        raise _damaged(path, "has no document bounds", "at least one")


def _read_offsets(path: Path, header: _Header) -> np.ndarray:
    """Return [documents + 1] offsets in tokens, from the whole .idx, which is checked."""
    sequences = header.sequences
    try:
        raw = np.fromfile(path, dtype=np.uint8, offset=HEADER.size)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})", "a readable file") from None
    _check_size(path, HEADER.size + len(raw), sequences, header.document_bounds)
    lengths = raw[: 4 * sequences].view("<i4")
    pointers = raw[4 * sequences : 12 * sequences].copy().view("<i8")
    document_bounds = raw[12 * sequences :].copy().view("<i8")
    if sequences and lengths.min() < 0:
        raise _damaged(path, f"has a sequence of {lengths.min()} tokens", "lengths of at least 0")
    offsets = np.zeros(sequences + 1, dtype=np.int64)
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    if not np.array_equal(pointers, offsets[:-1] * header.dtype.itemsize):
        raise _damaged(path, "has sequences that do not lie one after another in the .bin")
    if document_bounds[0] != 0 or document_bounds[-1] != sequences or (np.diff(document_bounds) < 0).any():
        raise _damaged(path, "has document bounds that do not rise from 0 to the number of sequences")
    return offsets[document_bounds]


def _map_tokens(path: Path, dtype: np.dtype, count: int) -> tuple[mmap.mmap | None, np.ndarray]:
    """Map the .bin and return the map with its ids [count]; an empty file has no map."""
    size = _size(path)
    if size != count * dtype.itemsize:
        raise _damaged(
            path, f"has {size} bytes", f"{count * dtype.itemsize} for the {count} tokens that its .idx speaks of"
        )
    if count == 0:
        return None, np.empty(0, dtype=dtype)
    with open(path, "rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return mapped, np.frombuffer(mapped, dtype=dtype.newbyteorder("<"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise _damaged(path, "the file does not exist", "a .bin and an .idx side by side") from None
