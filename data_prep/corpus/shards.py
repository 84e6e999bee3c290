"""Parquet shards as streams of documents, in bounded memory whatever the size of a shard or of its row groups."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpus.find_shards import COMPRESSED
from yxanul_nemo.errors import UserError

READ_BUFFER_BYTES = 1 << 20
"""Column chunks are read through a buffer of this size instead of as a whole."""
BATCH_BYTES = 4 << 20
"""Text decoded at a time, by the file's own average row size."""
MAX_BATCH_ROWS = 32
"""Rows decoded at a time at most: a few megabytes repeated many times take little room in the file, but not once decoded."""

AS_LINES = "Let its name end in .jsonl."

BEGINNINGS = (
    (
        b"version https://git-lfs",
        "is a Git-LFS pointer and not the file itself",
        "Run `git lfs pull` in its repository.",
    ),
    (b"{", "looks like JSON lines", AS_LINES),
    (b"[", "looks like JSON", "Write its objects a line each, and " + AS_LINES[0].lower() + AS_LINES[1:]),
    (b"<", "looks like a web page, as a download that needs a login or failed gives one", "Download it again."),
    (b"\x1f\x8b", "is compressed with gzip", COMPRESSED),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", COMPRESSED),
    (b"PK\x03\x04", "is a zip archive", COMPRESSED),
    (
        b"ARROW1",
        "is an Arrow file",
        "`pyarrow.parquet.write_table(pyarrow.ipc.open_file('x').read_all(), 'x.parquet')` makes parquet.",
    ),
    (b"PARE", "is encrypted parquet", "Decrypt it first."),
)
"""First bytes of what is taken for parquet by mistake -> what it is, and what to do."""

BYTES_OF_TEXT = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""Types whose values can be taken as bytes without a copy or a check."""


@dataclass
class SkippedRows:
    """Rows that gave no document, by reason."""

    null: int = 0
    """No value."""
    empty: int = 0
    """Text of length 0, or a list without ids."""
    not_utf8: int = 0
    """Text whose bytes are not UTF-8."""

    @property
    def total(self) -> int:
        return self.null + self.empty + self.not_utf8


@dataclass
class DocumentBatch:
    """Some consecutive documents of a shard. Of `texts` and `ids`, the one that the shard's column holds is filled."""

    texts: list[str] = field(default_factory=list)
    """Each document's text."""
    raw_texts: list[bytes] = field(default_factory=list)
    """The same in UTF-8, as the file has it."""
    ids: list[np.ndarray] = field(default_factory=list)
    """Each document's token ids, int64."""
    rows: int = 0
    """Rows of the shard that this batch covers, skipped ones included."""
    skipped: SkippedRows = field(default_factory=SkippedRows)


class ShardReader:
    """Stream the documents of one parquet file.

    Raises UserError that names the file where it is not parquet, lacks the column, has it in another type, or is damaged.
    """

    def __init__(self, path: Path, text_column: str = "text", ids_column: str | None = None):
        self.path = path
        self.column = ids_column or text_column
        self.holds_ids = ids_column is not None
        try:
            self._file = pq.ParquetFile(
                path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            schema = self._file.schema_arrow
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from None
        if self.column not in schema.names:
            names = ", ".join(str(name) for name in schema.names)
            raise UserError(path, f"has no column '{self.column}' (it has: {names})", fix=self._column_fix(schema))
        if schema.names.count(self.column) > 1:
            raise UserError(path, f"has the column '{self.column}' {schema.names.count(self.column)} times", "once")
        kind = schema.field(self.column).type
        if not (pa.types.is_null(kind) or (_is_list_of_ints(kind) if self.holds_ids else _is_text(kind))):
            wanted = "list<int>" if self.holds_ids else "string"
            raise UserError(path, f"column '{self.column}' is of type {kind}", wanted, self._column_fix(schema))
        self.rows = self._file.metadata.num_rows
        self.column_bytes = self._uncompressed_bytes()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def batches(self) -> Iterator[DocumentBatch]:
        """All rows in order, a few at a time."""
        average = max(1, self.column_bytes // max(1, self.rows))
        batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // average))
        read = _read_ids if self.holds_ids else _read_texts
        rows = 0
        try:
            for batch in self._file.iter_batches(batch_size=batch_rows, columns=[self.column], use_threads=False):
                # Column names with dots select nested fields of the same name, too.
                documents = read(batch.column(batch.schema.get_field_index(self.column)))
                rows += documents.rows
                yield documents
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        if rows != self.rows:
            raise UserError(
                self.path, f"holds {rows} rows", f"{self.rows}, as its footer says", "Get a good copy of it."
            )

    def _uncompressed_bytes(self) -> int:
        """Size of the column before compression, as the footer has it."""
        metadata = self._file.metadata
        total = 0
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for index in range(row_group.num_columns):
                chunk = row_group.column(index)
                if chunk.path_in_schema == self.column or chunk.path_in_schema.startswith(self.column + "."):
                    total += chunk.total_uncompressed_size
        return total

    def _column_fix(self, schema: pa.Schema) -> str:
        key = "ids_column" if self.holds_ids else "text_column"
        fits = _is_list_of_ints if self.holds_ids else _is_text
        usable = [str(column.name) for column in schema if fits(column.type)]
        return f"Set the source's {key} to one of: {', '.join(usable)}." if usable else f"No column can serve as {key}."

    def _unreadable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        for beginning, what, fix in BEGINNINGS:
            if self._beginning().startswith(beginning):
                return UserError(self.path, what, "a parquet file", fix)
        return UserError(
            self.path, f"cannot be read as parquet ({reason})", "a whole parquet file", "Get a good copy of it."
        )

    def _beginning(self) -> bytes:
        try:
            with open(self.path, "rb") as handle:
                return handle.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        except OSError:
            return b""


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        check(kind)
        for check in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
        )
    )


def _is_list_of_ints(kind: pa.DataType) -> bool:
    """Whether it is a list of whole numbers; one of nulls alone is what writers make where every list is empty or null."""
    checks = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(check(kind) for check in checks) and (
        pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)
    )


def _read_texts(column: pa.Array) -> DocumentBatch:
    batch = DocumentBatch(rows=len(column))
    for value in _as_bytes(column):
        if value is None:
            batch.skipped.null += 1
        elif not value:
            batch.skipped.empty += 1
        else:
            try:
                batch.texts.append(value.decode())
            except UnicodeDecodeError:
                batch.skipped.not_utf8 += 1
            else:
                batch.raw_texts.append(value)
    return batch


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """Values as they are in the file, before any check of their encoding."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return [None] * len(column)
    return column.cast(BYTES_OF_TEXT.get(column.type, column.type)).to_pylist()


def _read_ids(column: pa.Array) -> DocumentBatch:
    batch = DocumentBatch(rows=len(column))
    for row in column:
        if not row.is_valid:
            batch.skipped.null += 1
        elif not len(row.values):
            batch.skipped.empty += 1
        else:
            if row.values.null_count:
                raise pa.ArrowInvalid("a list of token ids has a null inside")
            batch.ids.append(row.values.to_numpy(zero_copy_only=False).astype(np.int64))
    return batch
