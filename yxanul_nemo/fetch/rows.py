"""Files of the hub as the parquet files that the rest of the project reads, row by row, in bounded memory."""

import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from yxanul_nemo.errors import UserError
from yxanul_nemo.files import atomic_file

BATCH_ROWS = 1000
JSON_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def write_rows(
    sources: Sequence[Path], target: Path, where: str, columns: Sequence[str] | None, rows: int | None
) -> None:
    """Write the first rows of some files, one after another, as one parquet file.

    Args:
        where: the key that names the files, for messages.
        columns: those to keep; None: all.
        rows: how many; None: all.

    Raises:
        UserError: a file is damaged, of another format, lacks a column, or there is no row.
    """
    found = itertools.islice((row for path in sources for row in _rows(path, where, columns)), rows)
    with atomic_file(target) as handle:
        writer = None
        while batch := list(itertools.islice(found, BATCH_ROWS)):
            table = pa.Table.from_pylist(batch, schema=writer.schema if writer else None)
            writer = writer or pq.ParquetWriter(handle, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            raise UserError(where, f"{sources[0].name} has no rows", "at least one")
        writer.close()


def _rows(path: Path, where: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        if path.name.endswith(JSON_ENDINGS):
            yield from _json_rows(path, where, columns)
        else:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        words = " ".join(str(error).split())
        raise UserError(
            where, f"{path.name} cannot be read ({words})", "parquet, or one JSON object per line"
        ) from None


def _json_rows(path: Path, where: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(where, f"line {number} of {path.name} is no JSON object", "one JSON object per line")
            if missing := [column for column in columns or () if column not in row]:
                raise UserError(
                    where, f"line {number} of {path.name} has no key '{missing[0]}'", f"one of {', '.join(row)}"
                )
            yield {column: row[column] for column in columns} if columns is not None else row
