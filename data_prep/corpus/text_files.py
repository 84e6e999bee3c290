"""JSON lines and plain text as streams of documents, packed by gzip or zstd or not, in bounded memory whatever the size of a file."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from data_prep.corpus.formats import compression_of
from data_prep.corpus.shards import DocumentBatch
from yxanul_nemo.errors import UserError
from yxanul_nemo.json_files import parse_json

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 4096
"""Text, and documents, handed on at a time."""
MOST_LINE_BYTES = 64 << 20
"""Longest line with a JSON object."""
SAMPLE_BYTES = 512 << 10
"""Bytes of a file as it lies on disk by which the rest of it is estimated: many of the pieces that are unpacked at once."""
LONGEST_DOCUMENT_BYTES = 16 << 10
"""Longer text files are cut into documents of at most this size, about 4,000 tokens: twice the longest window of any recipe, and a book
gives enough of them to hold some out."""
CUTS = (b"\n\n", b"\n\r\n", b"\n", b" ")
"""Where a long text is cut: behind the last one, in the second half of what a document may hold, of the first kind that is there."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HIGHEST_ID = 2**31


class JsonLinesReader:
    """Stream the documents of a file with a JSON object on each line, of which one key holds the text or the token ids.

    A value of null or an absent key gives no document and is counted; blank lines are passed over.

    Raises UserError that names the file and line where a line is no object, its value is of another type, or the first one lacks the key.
    """

    def __init__(self, path: Path, text_column: str = "text", ids_column: str | None = None):
        self.path = path
        self.column, self.holds_ids = ids_column or text_column, ids_column is not None
        self._check_first_line()

    def __enter__(self) -> "JsonLinesReader":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open between batches."""

    @property
    def rows(self) -> int:
        """Lines, estimated from the beginning of the file."""
        return self._estimate[0]

    @property
    def column_bytes(self) -> int:
        """Bytes of text in the column, estimated from the beginning of the file."""
        return self._estimate[1]

    def batches(self) -> Iterator[DocumentBatch]:
        """All lines in order, some at a time."""
        batch, held_bytes = DocumentBatch(), 0
        for number, row in self._objects():
            held_bytes += self._add(batch, number, row)
            if held_bytes >= BATCH_BYTES or batch.rows >= BATCH_DOCUMENTS:
                yield batch
                batch, held_bytes = DocumentBatch(), 0
        if batch.rows:
            yield batch

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each line's number and object."""
        for number, line, _ in _lines(self.path):
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode())
            except UnicodeDecodeError:
                yield number, {self.column: line}
                continue
            except ValueError as error:
                raise self._wrong(number, f"is no JSON ({error})", "one JSON object per line") from None
            if not isinstance(row, dict):
                raise self._wrong(number, f"holds a JSON {type(row).__name__}", "one JSON object per line")
            yield number, row

    def _add(self, batch: DocumentBatch, number: int, row: dict[str, Any]) -> int:
        """Add a line's document, or count why it has none; return the bytes that it holds."""
        value = row.get(self.column)
        batch.rows += 1
        if value is None:
            batch.skipped.null += 1
        elif isinstance(value, bytes):
            batch.skipped.not_utf8 += 1
        elif self.holds_ids:
            if not isinstance(value, list) or any(type(one) is not int or abs(one) >= HIGHEST_ID for one in value):
                raise self._wrong(number, f"has no token ids in '{self.column}'", "a list of whole numbers")
            if value:
                batch.ids.append(np.array(value, dtype=np.int64))
                return batch.ids[-1].nbytes
            batch.skipped.empty += 1
        elif not isinstance(value, str):
            raise self._wrong(number, f"has a JSON {type(value).__name__} in '{self.column}'", "text", self._fix(row))
        else:
            return add_text(batch, value.encode(errors="surrogatepass"))
        return 0

    def _check_first_line(self) -> None:
        number, row = next(self._objects(), (0, {self.column: None}))
        if self.column not in row:
            names = ", ".join(row)
            raise self._wrong(number, f"has no key '{self.column}' (it has: {names})", fix=self._fix(row))
        self._add(DocumentBatch(), number, row)

    def _fix(self, row: dict[str, Any]) -> str:
        key, kind = ("ids_column", list) if self.holds_ids else ("text_column", str)
        usable = [name for name, value in row.items() if isinstance(value, kind)]
        return f"Set the source's {key} to one of: {', '.join(usable)}." if usable else f"No key can serve as {key}."

    def _wrong(self, number: int, problem: str, expected: str = "", fix: str = "") -> UserError:
        return UserError(f"{self.path} line {number}", problem, expected, fix)

    @cached_property
    def _estimate(self) -> tuple[int, int]:
        """Lines and bytes of text of the whole file."""
        read_bytes = rows = text_bytes = 0
        for _, line, position in _lines(self.path):
            # What was read at once is counted as a whole.
            if position > read_bytes >= SAMPLE_BYTES:
                break
            rows, read_bytes = rows + 1, position
            try:
                row = json.loads(line)
            except ValueError:
                # Whoever reads the file as a whole says what is wrong there.
                continue
            value = row.get(self.column) if isinstance(row, dict) else None
            text_bytes += len(value) * 4 if isinstance(value, list) else len(str(value or "").encode(errors="replace"))
        factor = self.path.stat().st_size / max(1, read_bytes)
        return round(rows * max(1.0, factor)), round(text_bytes * max(1.0, factor))


class TextReader:
    """Stream text files one after another. A file is a document; a long one is cut into several, between paragraphs where it can be.

    A file without text, and a document that is not UTF-8, are counted.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths
        for path in paths[:1]:
            with opened(path) as stream:
                stream.read(1)

    def __enter__(self) -> "TextReader":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open between batches."""

    @cached_property
    def column_bytes(self) -> int:
        """Bytes of text; what is packed is estimated from its beginning."""
        return sum(_expected_bytes(path) for path in self.paths)

    @property
    def rows(self) -> int:
        """Documents, estimated from the sizes."""
        return len(self.paths) + self.column_bytes // LONGEST_DOCUMENT_BYTES

    def batches(self) -> Iterator[DocumentBatch]:
        """All documents in order, some at a time."""
        batch, held_bytes = DocumentBatch(), 0
        for path in self.paths:
            for document in _documents(path):
                batch.rows += 1
                held_bytes += add_text(batch, document)
                if held_bytes >= BATCH_BYTES or batch.rows >= BATCH_DOCUMENTS:
                    yield batch
                    batch, held_bytes = DocumentBatch(), 0
        if batch.rows:
            yield batch


def add_text(batch: DocumentBatch, raw: bytes) -> int:
    """Add a document to a batch, or count why it gives none; return the bytes that it holds."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        batch.skipped.not_utf8 += 1
        return 0
    if not text:
        batch.skipped.empty += 1
        return 0
    batch.texts.append(text)
    batch.raw_texts.append(raw)
    return len(raw)


@contextmanager
def opened(path: Path, at: list[BinaryIO] | None = None) -> Iterator[pa.NativeFile]:
    """Open a file for reading, unpacked. Raises UserError that names it if it cannot be read, then or later."""
    try:
        with open(path, "rb") as file, pa.input_stream(file, compression=compression_of(path.name)) as stream:
            if at is not None:
                at.append(file)
            yield stream
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(path, f"cannot be read ({reason})", "a whole file", "Get a good copy of it.") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Each line's number, its bytes, and how far the file, as it lies on disk, was read for it."""
    files: list[BinaryIO] = []
    with opened(path, files) as stream:
        rest, number = b"", 0
        while block := stream.read(BATCH_BYTES):
            *lines, rest = (rest + block).split(b"\n") if b"\n" in block else (rest + block,)
            if len(rest) > MOST_LINE_BYTES:
                where = f"{path} line {number + len(lines) + 1}"
                raise UserError(where, f"has more than {MOST_LINE_BYTES:,} bytes", "one JSON object per line")
            for line in lines:
                number += 1
                yield number, line if number > 1 else line.removeprefix(BYTE_ORDER_MARK), files[0].tell()
        if rest:
            yield number + 1, rest if number else rest.removeprefix(BYTE_ORDER_MARK), files[0].tell()


def _documents(path: Path) -> Iterator[bytes]:
    """The file's text in documents; a file without text gives one that is empty."""
    with opened(path) as stream:
        held = stream.read(LONGEST_DOCUMENT_BYTES).removeprefix(BYTE_ORDER_MARK)
        while block := stream.read(BATCH_BYTES):
            held += block
            start = 0
            while len(held) - start > LONGEST_DOCUMENT_BYTES:
                end = _cut(held, start, start + LONGEST_DOCUMENT_BYTES)
                yield held[start:end]
                start = end
            held = held[start:]
        yield held


def _cut(text: bytes, start: int, end: int) -> int:
    """Where to cut `text` after `start` and at most at `end`: behind a paragraph, a line, a word, or at least a character."""
    for mark in CUTS:
        found = text.rfind(mark, start + LONGEST_DOCUMENT_BYTES // 2, end)
        if found > start:
            return found + len(mark)
    # A character has at most three bytes after its first.
    return next((at for at in range(end, end - 4, -1) if text[at] & 0b1100_0000 != 0b1000_0000), end)


def _expected_bytes(path: Path) -> int:
    size = path.stat().st_size
    if compression_of(path.name) is None:
        return size
    files: list[BinaryIO] = []
    with opened(path, files) as stream:
        text_bytes = 0
        while files[0].tell() < SAMPLE_BYTES and (block := stream.read(BATCH_BYTES)):
            text_bytes += len(block)
        return round(size * text_bytes / max(1, files[0].tell()))
