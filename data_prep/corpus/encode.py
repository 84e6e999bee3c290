"""One shard to its .bin/.idx pairs, and the record that says it is done."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import ValidationError

from data_prep.corpus.find_shards import InputShard
from data_prep.corpus.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from data_prep.corpus.manifest import InputEntry, ShardEntry
from data_prep.corpus.open_shard import DocumentReader, open_shard
from data_prep.corpus.shards import DocumentBatch, SkippedRows
from data_prep.tokenizers.superword_encoder import SuperwordEncoder
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import sha256_file, write_text_atomic
from yxanul_nemo.read_ahead import read_ahead
from yxanul_nemo.stored import Stored

CHUNK_BYTES = 2 << 20
"""Text handed to the tokenizer at a time: enough to keep its threads busy, little beside the memory of the process."""
SPLITS = ("train", "heldout")


class Encoder(Protocol):
    """The part of a tokenizer that preparing a shard uses."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]: ...

    def decode(self, ids: np.ndarray) -> str: ...


class BulkEncoder(Encoder, Protocol):
    """A tokenizer whose faster encoder is made once and handed to other processes."""

    def bulk_encoder(self) -> SuperwordEncoder | None: ...

    def use_bulk_encoder(self, encoder: SuperwordEncoder | None) -> None: ...


class ShardOptions(Stored):
    """All that decides a shard's output, besides its input."""

    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    heldout_fraction: float
    column: str
    holds_ids: bool


class ShardRecord(Stored):
    """Written when both pairs of a shard are on disk; its presence means that the shard is done."""

    options: ShardOptions
    input: InputEntry
    input_mtime_ns: int
    train: ShardEntry | None
    heldout: ShardEntry | None

    @classmethod
    def load(cls, path: Path) -> "ShardRecord | None":
        """The record at `path`; None if there is none or it is of an older format, so that the shard is done again."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def outputs_present(self, data_dir: Path) -> bool:
        """Whether the pairs are there with the sizes that their counts imply."""
        itemsize = token_dtype(self.options.vocab_size).itemsize
        for entry in (self.train, self.heldout):
            if entry is None:
                continue
            prefix = data_dir / entry.prefix
            # 34 bytes of header, 12 for each sequence and 8 for each bound of a document.
            sizes = {bin_path(prefix): entry.tokens * itemsize, idx_path(prefix): 34 + 20 * entry.documents + 8}
            if any(not path.is_file() or path.stat().st_size != size for path, size in sizes.items()):
                return False
        return True


@dataclass(frozen=True)
class ShardTask:
    """One shard to prepare."""

    data_dir: Path
    source: str
    shard: InputShard
    options: ShardOptions
    input_gone: bool = False
    """The source's input was removed after it was prepared."""

    def open(self) -> DocumentReader:
        """The input. Raises UserError if it cannot be read."""
        return open_shard(self.shard, self.options.column, self.options.column if self.options.holds_ids else None)

    @property
    def record_path(self) -> Path:
        return self.data_dir / self.source / "records" / f"{self.shard.stem}.json"

    def prefix(self, split: str) -> str:
        """Path prefix of a pair, relative to `data_dir`."""
        return f"{self.source}/{split}/{self.shard.stem}"


@dataclass(frozen=True)
class Progress:
    """Work done since the last report."""

    rows: int
    text_bytes: int
    tokens: int


@dataclass
class _Chunk:
    """Documents to encode together."""

    batches: list[DocumentBatch] = field(default_factory=list)
    text_bytes: int = 0


@dataclass
class _SplitOutput:
    """The pair of one split while it is written; the files are opened with the first document."""

    writer: IndexedWriter | None = None
    text_bytes: int = 0

    def add(
        self, documents: list[np.ndarray], text_bytes: int, stack: ExitStack, prefix: Path, dtype: np.dtype
    ) -> None:
        if documents:
            if self.writer is None:
                self.writer = stack.enter_context(IndexedWriter(prefix, dtype))
            self.writer.add_documents(documents)
            self.text_bytes += text_bytes


def is_heldout(document: bytes, heldout_fraction: float) -> bool:
    """The split rule: a function of the document's bytes alone (UTF-8 text, or its ids as little-endian int64)."""
    digest = hashlib.blake2b(document, digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(heldout_fraction * 2**64)


def prepare_shard(
    task: ShardTask, encoder: Encoder, report: Callable[[Progress], None], chunk_bytes: int = CHUNK_BYTES
) -> ShardRecord:
    """Tokenize one shard into `<source>/train/<stem>` and `<source>/heldout/<stem>` and commit its record, last.

    Raises UserError if the shard cannot be read, changes meanwhile or holds ids outside the vocabulary, and OSError if the
    output cannot be written; the shard's outputs are removed then.
    """
    paths, options = task.shard.paths, task.options
    before = input_stat(paths)
    digest = input_sha256(paths)
    task.record_path.unlink(missing_ok=True)
    try:
        rows, skipped, train, heldout = _write_pairs(task, encoder, report, chunk_bytes)
        if input_stat(paths) != before:
            raise UserError(
                task.shard.where, "changed while it was read", "a file that nobody writes to", "Run the command again."
            )
        record = ShardRecord(
            options=options,
            input=InputEntry(
                file=task.shard.name,
                bytes=before[0],
                sha256=digest,
                rows=rows,
                skipped_null=skipped.null,
                skipped_empty=skipped.empty,
                skipped_not_utf8=skipped.not_utf8,
            ),
            input_mtime_ns=before[1],
            train=train,
            heldout=heldout,
        )
        write_text_atomic(task.record_path, record.model_dump_json(indent=2) + "\n")
    except BaseException:
        for split in SPLITS:
            prefix = task.data_dir / task.prefix(split)
            for output in (bin_path(prefix), idx_path(prefix)):
                output.unlink(missing_ok=True)
        raise
    return record


def _write_pairs(
    task: ShardTask, encoder: Encoder, report: Callable[[Progress], None], chunk_bytes: int
) -> tuple[int, SkippedRows, ShardEntry | None, ShardEntry | None]:
    """Number of rows, those left out, and the pairs written (None for a split without documents)."""
    where, options = task.shard.where, task.options
    rows, skipped = 0, SkippedRows()
    dtype = token_dtype(options.vocab_size)
    outputs = {split: _SplitOutput() for split in SPLITS}
    with task.open() as reader, ExitStack() as stack:
        for chunk in stack.enter_context(closing(read_ahead(_chunks(reader, chunk_bytes), depth=1))):
            documents, keys, sizes = _encoded(chunk, encoder, options, where, chunk_bytes)
            heldout = [is_heldout(key, options.heldout_fraction) for key in keys]
            for split, output in outputs.items():
                chosen = [i for i, held in enumerate(heldout) if held == (split == "heldout")]
                output.add(
                    [documents[i] for i in chosen],
                    sum(sizes[i] for i in chosen),
                    stack,
                    task.data_dir / task.prefix(split),
                    dtype,
                )
            for batch in chunk.batches:
                skipped.null += batch.skipped.null
                skipped.empty += batch.skipped.empty
                skipped.not_utf8 += batch.skipped.not_utf8
            chunk_rows = sum(batch.rows for batch in chunk.batches)
            rows += chunk_rows
            report(Progress(chunk_rows, sum(sizes), sum(len(ids) for ids in documents)))
    train, held = (_entry(outputs[split], task.prefix(split)) for split in SPLITS)
    return rows, skipped, train, held


def input_stat(paths: Sequence[Path]) -> tuple[int, int]:
    """Return the size in bytes and the time of change in nanoseconds, of several files their sums.

    Raises UserError if a file is not there or not readable.
    """
    sizes = changed = 0
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(path, f"cannot be read ({error.strerror})", "a readable file") from None
        sizes, changed = sizes + status.st_size, changed + status.st_mtime_ns
    return sizes, changed


def input_sha256(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of an input; of several files that of their names and hashes. Raises UserError if one is not readable."""
    hashes = []
    for path in paths:
        try:
            hashes.append(sha256_file(path))
        except OSError as error:
            raise UserError(path, f"cannot be read ({error.strerror})", "a readable file") from None
    if len(paths) == 1:
        return hashes[0]
    listed = "".join(f"{digest}  {path.name}\n" for path, digest in zip(paths, hashes, strict=True))
    return hashlib.sha256(listed.encode()).hexdigest()


def _entry(output: _SplitOutput, prefix: str) -> ShardEntry | None:
    if output.writer is None:
        return None
    pair = output.writer.result
    return ShardEntry(
        prefix=prefix,
        documents=pair.documents,
        tokens=pair.tokens,
        text_bytes=output.text_bytes,
        bin_sha256=pair.bin_sha256,
        idx_sha256=pair.idx_sha256,
    )


def _chunks(reader: DocumentReader, chunk_bytes: int) -> Iterator[_Chunk]:
    """Batches joined until they hold so many bytes."""
    chunk = _Chunk()
    for batch in reader.batches():
        chunk.batches.append(batch)
        chunk.text_bytes += sum(map(len, batch.raw_texts)) + sum(ids.nbytes for ids in batch.ids)
        if chunk.text_bytes >= chunk_bytes:
            yield chunk
            chunk = _Chunk()
    if chunk.batches:
        yield chunk


def _encoded(
    chunk: _Chunk, encoder: Encoder, options: ShardOptions, where: str, chunk_bytes: int
) -> tuple[list[np.ndarray], list[bytes], list[int]]:
    """Each document's ids with EOS, the bytes that decide its split, and the size of its text in bytes."""
    eos = options.eos_id
    if not options.holds_ids:
        texts = [text for batch in chunk.batches for text in batch.texts]
        raw = [text for batch in chunk.batches for text in batch.raw_texts]
        sizes = [len(text) for text in raw]
        documents = []
        for first, last in _slices(sizes, chunk_bytes):
            documents += [_ended(ids, eos) for ids in encoder.encode_batch(texts[first:last])]
        return documents, raw, sizes
    documents, keys, sizes = [], [], []
    for batch in chunk.batches:
        for ids in batch.ids:
            if ids.min() < 0 or ids.max() >= options.vocab_size:
                wrong = ids.min() if ids.min() < 0 else ids.max()
                known = f"ids from 0 to {options.vocab_size - 1}, the tokenizer's"
                raise UserError(where, f"column '{options.column}' has token id {wrong}", known)
            body = ids[:-1] if ids[-1] == eos else ids
            if not len(body):
                batch.skipped.empty += 1
                continue
            documents.append(_ended(body, eos))
            keys.append(body.astype("<i8").tobytes())
            sizes.append(len(encoder.decode(body).encode(errors="replace")))
    return documents, keys, sizes


def _slices(sizes: list[int], chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive runs of one or two chunks' size: a batch of long documents would take a tokenizer gigabytes at once."""
    first = held = 0
    for i, size in enumerate(sizes):
        if held and held + size > 2 * chunk_bytes:
            yield first, i
            first, held = i, 0
        held += size
    if first < len(sizes):
        yield first, len(sizes)


def _ended(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """[length + 1] the ids and EOS."""
    ended = np.empty(len(ids) + 1, dtype=np.int32)
    ended[:-1] = ids
    ended[-1] = eos_id
    return ended
