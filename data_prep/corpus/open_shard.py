"""A reader for a shard of any format."""

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

from data_prep.corpus.find_shards import InputShard
from data_prep.corpus.formats import Format
from data_prep.corpus.shards import DocumentBatch, ShardReader
from data_prep.corpus.text_files import JsonLinesReader, TextReader
from yxanul_nemo.errors import UserError


class DocumentReader(Protocol):
    """Stream the documents of a shard, a few at a time; a context manager."""

    @property
    def rows(self) -> int:
        """Rows, lines or documents: exact for parquet, else an estimate."""

    @property
    def column_bytes(self) -> int:
        """Bytes of text: of the column before compression for parquet, else an estimate."""

    def batches(self) -> Iterator[DocumentBatch]:
        """All documents in order. Raises UserError where the shard is damaged."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_shard(shard: InputShard, text_column: str = "text", ids_column: str | None = None) -> DocumentReader:
    """Open a shard; its documents are read later.

    Args:
        text_column: parquet's column, or the key of JSON lines, with the text.
        ids_column: that with token ids, in place of text.

    Raises:
        UserError: the file cannot be read, or lacks the column.
    """
    if shard.kind is Format.TEXT:
        if ids_column is not None:
            raise UserError(shard.where, f"is plain text, without a column '{ids_column}'", fix="Unset ids_column.")
        return TextReader(shard.paths)
    if shard.kind is Format.JSON_LINES:
        return JsonLinesReader(shard.paths[0], text_column, ids_column)
    return ShardReader(shard.paths[0], text_column, ids_column)
