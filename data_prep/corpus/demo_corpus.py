"""The demo's corpus: a few megabytes of real text that every machine has, as parquet shards of three sources."""

import glob
import hashlib
import re
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpus.demo_text import Document, read_source, readmes, source_files, topics
from yxanul_nemo.config.data import DEMO_SOURCES, SourceConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import atomic_file, write_json_atomic
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.log import logger

SHARES = {"prose": 0.4, "reference": 0.4, "code": 0.2}
"""Part of the corpus that each source gets, by bytes."""
RECORD_NAME = "corpus.json"
SHARD_BYTES = 500_000
ROW_GROUP_ROWS = 200


def write_demo_corpus(folder: Path, total_bytes: int) -> dict[str, SourceConfig]:
    """Write `folder`/<source>-NNN.parquet with columns `text` and `origin`, unless it is complete already.

    Args:
        total_bytes: UTF-8 bytes over all sources; less if the installed packages do not have as much.

    Returns the sources. Raises UserError if the folder holds a corpus of another size, or no package has text.
    """
    with disk_errors(folder, "writing the demo's corpus"):
        return _write_once(folder, total_bytes)


def _write_once(folder: Path, total_bytes: int) -> dict[str, SourceConfig]:
    record_path = folder / RECORD_NAME
    record = _read_record(record_path)
    if record is not None and record["demo_bytes"] != total_bytes:
        raise UserError(
            "data.demo_bytes",
            f"{total_bytes} differs from the corpus in {folder}, made with {record['demo_bytes']}",
            "the same size",
            f"Use data.demo_bytes={record['demo_bytes']} or another run.dir.",
        )
    if record is None or not all((folder / name).is_file() for name in record["files"]):
        record = _write_corpus(folder, total_bytes)
        write_json_atomic(record_path, record)
    return {name: SourceConfig(path=f"{glob.escape(str(folder))}/{name}-*.parquet") for name in DEMO_SOURCES}


def _read_record(path: Path) -> dict[str, Any] | None:
    """What a complete corpus was made with; None if there is none."""
    try:
        record = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("files"), list) or "demo_bytes" not in record:
        raise UserError(
            path, "is not the record of a demo corpus", fix=f"Delete {path.parent} and run the command again."
        )
    return record


def _write_corpus(folder: Path, total_bytes: int) -> dict[str, Any]:
    """Write all shards, in place of any that an interrupted run left."""
    for left_over in (*folder.glob(".*.tmp"), *folder.glob("*.parquet")):
        left_over.unlink()
    files = []
    for name, documents in collect(total_bytes).items():
        if not documents:
            problem = f"found no text for the source {name} in the installed packages"
            raise UserError(folder, problem, fix="Install what uv.lock names: `uv sync`.")
        size = sum(len(document.text.encode()) for document in documents)
        shards = max(2, round(size / SHARD_BYTES))
        for number in range(shards):
            files.append(f"{name}-{number:03d}.parquet")
            _write_shard(folder / files[-1], documents[number::shards])
        logger.info("demo corpus: %s: %d documents, %s bytes", name, len(documents), f"{size:,}")
    return {"demo_bytes": total_bytes, "files": files}


def collect(total_bytes: int) -> dict[str, list[Document]]:
    """Documents of each source up to its share, without duplicates, in an order that depends on their text alone."""
    sources = {name: _Source(int(total_bytes * share)) for name, share in SHARES.items()}
    seen: set[bytes] = set()
    # Half of the room at most, so that what comes first does not crowd out everything else.
    sources["prose"].add(readmes(), seen, limit=sources["prose"].limit // 2)
    sources["reference"].add(topics(), seen, limit=sources["reference"].limit // 2)
    for file in chain.from_iterable(zip_longest(*source_files())):
        wanted = {name for name, source in sources.items() if not source.full}
        if not wanted:
            break
        if file is not None:
            path, shown = file
            for name, documents in read_source(path, shown, wanted).items():
                sources[name].add(documents, seen)
    return {name: sorted(source.documents, key=_order) for name, source in sources.items()}


class _Source:
    """Documents of one source, up to its share."""

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        self.documents: list[Document] = []

    @property
    def full(self) -> bool:
        return self.bytes >= self.limit

    def add(self, documents: Iterable[Document], seen: set[bytes], limit: int | None = None) -> None:
        """Take documents that were not seen yet, neither whole nor by their beginning."""
        for document in documents:
            if self.bytes >= (self.limit if limit is None else limit):
                return
            marks = _marks(document.text)
            if seen.isdisjoint(marks):
                self.documents.append(document)
                self.bytes += len(document.text.encode())
            seen.update(marks)


def _marks(text: str) -> tuple[bytes, bytes]:
    """Hashes of a text and of its first 150 letters and digits, whatever the layout and case."""
    plain = re.sub(r"[\W_]+", " ", text).strip().lower()
    return _sha256(plain), _sha256(plain[:150])


def _order(document: Document) -> bytes:
    return _sha256(document.text)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _strings(values: Iterable[str]) -> pa.StringArray:
    # pa.array would import pandas, which takes a second, to ask whether a list is one of its types.
    encoded = [value.encode() for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def _write_shard(path: Path, documents: list[Document]) -> None:
    columns = [_strings(document.text for document in documents), _strings(document.origin for document in documents)]
    table = pa.table(columns, schema=pa.schema([("text", pa.string()), ("origin", pa.string())]))
    with atomic_file(path) as handle:
        pq.write_table(table, handle, compression="zstd", row_group_size=ROW_GROUP_ROWS)
