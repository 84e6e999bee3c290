"""All shards of a corpus: what is done, what is missing, whether what is done still fits, and the manifest at the end."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_prep.corpus.encode import (
    SPLITS,
    BulkEncoder,
    Encoder,
    ShardOptions,
    ShardRecord,
    ShardTask,
    input_sha256,
    input_stat,
)
from data_prep.corpus.find_shards import InputShard, NoShardsError, find_shards
from data_prep.corpus.indexed import token_dtype_name
from data_prep.corpus.manifest import MANIFEST_NAME, CorpusManifest, SourceManifest, load_manifest
from data_prep.corpus.pool import run_shards
from data_prep.corpus.progress import ProgressDisplay
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.disk_errors import disk_error, disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.file_locks import only_process
from yxanul_nemo.log import logger

PROCESS_MIN_BYTES = 16 << 20
"""Below this much text, threads in this process are done before worker processes have started."""
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LISTED = 10
"""Names listed in one message at most."""


def prepare_corpus(
    data_dir: Path,
    sources: Mapping[str, SourceConfig],
    encoder: BulkEncoder,
    load_encoder: Callable[[], BulkEncoder],
    heldout_fraction: float,
    workers: int = 0,
    process_min_bytes: int = PROCESS_MIN_BYTES,
) -> CorpusManifest:
    """Tokenize every shard that is not done yet into `data_dir` and write the manifest; repeating it costs next to nothing.

    Args:
        sources: name -> where its files are; names become folders.
        encoder: the tokenizer.
        load_encoder: picklable; makes the same tokenizer in a worker process.
        workers: cores to use; 0: all of this process.
        process_min_bytes: input size from which worker processes are started.

    Raises UserError if inputs, tokenizer or options differ from those of the work already done, if shards cannot be read (after
    the others are finished), or if the disk is full.
    """
    with disk_errors(data_dir, "preparing data"), _only_process(data_dir):
        old = load_manifest(data_dir) if (data_dir / MANIFEST_NAME).exists() else None
        tasks = {
            name: _tasks(data_dir, name, source, encoder, heldout_fraction, old) for name, source in sources.items()
        }
        _remove_temporary_files(data_dir, sources)
        if old is not None:
            _refuse_other_corpus(data_dir, old, tasks, encoder.fingerprint)
        records = {task: record for group in tasks.values() for task in group if (record := _finished(task))}
        missing = [task for group in tasks.values() for task in group if task not in records]
        if lost := {task.shard.name for task in missing if task.input_gone}:
            raise UserError(
                data_dir,
                f"tokens of {_listed(lost)} are absent or cut short, and the files they are made of are gone, too",
                "one or the other",
                "Bring these files back and run the same command again.",
            )
        if missing:
            records |= _run(data_dir, missing, encoder, load_encoder, _cores(workers), process_min_bytes)
        manifest = _manifest(
            encoder, heldout_fraction, {name: [records[task] for task in group] for name, group in tasks.items()}
        )
        if old is not None:
            # Of sources that other runs on these tokens read.
            manifest = manifest.model_copy(update={"sources": old.sources | manifest.sources})
        if manifest != old:
            manifest.save(data_dir)
            _warn_of_copies(manifest)
        return manifest


def _cores(workers: int) -> int:
    return workers or len(os.sched_getaffinity(0))


@contextmanager
def _only_process(data_dir: Path) -> Iterator[None]:
    """Hold `data_dir`'s lock; the kernel drops it when the process ends, however it ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(only_process(data_dir / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(
                data_dir, "another process prepares this folder now", fix="Wait for it, or use another data.dir."
            ) from None
        yield


def _remove_temporary_files(data_dir: Path, sources: Mapping[str, SourceConfig]) -> None:
    """Remove what a killed run left behind."""
    patterns = [f".{MANIFEST_NAME}.*.tmp"]
    patterns += [f"{name}/{folder}/.*.tmp" for name in sources for folder in (*SPLITS, "records")]
    for pattern in patterns:
        for path in data_dir.glob(pattern):
            path.unlink(missing_ok=True)


def _tasks(
    data_dir: Path,
    name: str,
    source: SourceConfig,
    encoder: Encoder,
    heldout_fraction: float,
    old: CorpusManifest | None,
) -> list[ShardTask]:
    """The source's shards; those of the finished corpus `old` where its input was removed since."""
    if not SOURCE_NAME.fullmatch(name):
        raise UserError(
            f"data.sources.{name}",
            "is not a name that can be a folder",
            "letters, digits, '.', '_' and '-', a letter or digit first",
        )
    options = ShardOptions(
        tokenizer_fingerprint=encoder.fingerprint,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        heldout_fraction=heldout_fraction,
        column=source.ids_column or source.text_column,
        holds_ids=source.ids_column is not None,
    )
    try:
        found = find_shards(source.files, f"data.sources.{name}.path")
    except NoShardsError:
        if old is None or name not in old.sources:
            raise
        logger.warning("%s: the files of %s are gone; going on with its finished tokens", source.files, name)
        entries = old.sources[name].inputs
        return [
            ShardTask(data_dir, name, InputShard((Path(source.files),), entry.file), options, True) for entry in entries
        ]
    if found.left_out and old is None:
        logger.warning("%s: of %s these are not read: %s", name, source.files, _listed(set(found.left_out)))
    return [ShardTask(data_dir, name, shard, options) for shard in found.shards]


def _finished(task: ShardTask) -> ShardRecord | None:
    """The shard's record if it is done with these options and this input; None if it is to be done.

    Raises UserError if it was done with others.
    """
    record = ShardRecord.load(task.record_path)
    if record is None:
        return None
    folder = task.data_dir / task.source
    again = f"Prepare into another data.dir, or delete {folder} to prepare this source again."
    if changes := _changes(record.options, task.options):
        raise UserError(folder, f"was prepared with other settings: {changes}", "the same settings", again)
    if not task.input_gone:
        _refuse_changed_input(task.shard, record, again)
    if not record.outputs_present(task.data_dir):
        logger.warning("%s: outputs of %s are absent or cut short; making them again", folder, task.shard.name)
        return None
    return record


def _refuse_changed_input(shard: InputShard, record: ShardRecord, again: str) -> None:
    size, mtime_ns = input_stat(shard.paths)
    if size != record.input.bytes:
        raise UserError(
            shard.where,
            f"has changed since it was prepared: {record.input.bytes} bytes then, {size} now",
            "the same file",
            again,
        )
    if mtime_ns != record.input_mtime_ns and (digest := input_sha256(shard.paths)) != record.input.sha256:
        raise UserError(
            shard.where,
            f"has changed since it was prepared: SHA-256 {record.input.sha256[:12]}... then, {digest[:12]}... now",
            "the same file",
            again,
        )


def _changes(old: ShardOptions, new: ShardOptions) -> str:
    """What differs, in the words of the configuration; hashes are cut short."""
    column = [f"{'ids_column' if options.holds_ids else 'text_column'}={options.column}" for options in (old, new)]
    said = [f"{column[0]} then, {column[1]} now"] if column[0] != column[1] else []
    for name, before in old:
        now = getattr(new, name)
        if before != now and name not in ("column", "holds_ids"):
            said.append(f"{name} {str(before)[:12]} then, {str(now)[:12]} now")
    return "; ".join(said)


def _refuse_other_corpus(
    data_dir: Path, old: CorpusManifest, tasks: dict[str, list[ShardTask]], tokenizer_fingerprint: str
) -> None:
    """A finished source keeps its shards: runs that began on it speak of its fingerprint. Another source may come beside it."""
    changes = []
    if not old.sources.keys() & tasks.keys() and old.tokenizer_fingerprint != tokenizer_fingerprint:
        changes.append("another tokenizer")
    for name in sorted(old.sources.keys() & tasks.keys()):
        before = {entry.file for entry in old.sources[name].inputs}
        now = {task.shard.name for task in tasks[name]}
        if before - now:
            changes.append(f"shards of {name} gone: {_listed(before - now)}")
        if now - before:
            changes.append(f"shards of {name} added: {_listed(now - before)}")
    if changes:
        raise UserError(
            data_dir,
            f"was prepared from another set of inputs ({'; '.join(changes)})",
            "the same shards of each source",
            f"Prepare into another data.dir. To go on with the new set here, delete {data_dir / MANIFEST_NAME}: finished shards are "
            "kept, but runs that began on the old set cannot be resumed.",
        )


def _warn_of_copies(manifest: CorpusManifest) -> None:
    """Shards with the same bytes are most often a mistake of copying; their text is trained on twice."""
    first: dict[str, str] = {}
    for name, source in manifest.sources.items():
        for entry in source.inputs:
            shard = f"{name}/{entry.file}"
            if (same := first.setdefault(entry.sha256, shard)) != shard:
                logger.warning("%s is a copy of %s, so that its text counts twice", shard, same)


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:LISTED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _run(
    data_dir: Path,
    missing: list[ShardTask],
    encoder: BulkEncoder,
    load_encoder: Callable[[], BulkEncoder],
    cores: int,
    process_min_bytes: int,
) -> dict[ShardTask, ShardRecord]:
    """Prepare shards, largest first so that none is left alone at the end."""
    sizes, rows, refused = {}, 0, []
    for task in missing:
        try:
            with task.open() as reader:
                sizes[task] = reader.column_bytes
                rows += reader.rows
        except UserError as error:
            refused.append(str(error))
    readable = sorted(sizes, key=lambda task: -sizes[task])
    use_processes = sum(sizes.values()) >= process_min_bytes
    records: dict[ShardTask, ShardRecord] = {}
    with ProgressDisplay(rows, len(readable)) as display:
        for outcome in run_shards(readable, encoder, load_encoder, cores, use_processes, display.advance):
            if outcome.record is not None:
                records[outcome.task] = outcome.record
                display.shard_done()
            elif outcome.refused:
                refused.append(outcome.refused)
            else:
                kept = f"{len(records)} of {len(missing)} shards are finished and kept."
                cause = OSError(outcome.write_errno, outcome.write_error)
                raise disk_error(cause, data_dir, "writing tokens", kept)
    if refused:
        raise _refused(data_dir, refused, len(missing), len(records))
    return records


def _refused(data_dir: Path, reasons: list[str], asked: int, finished: int) -> UserError:
    listed = reasons[:LISTED] + ([f"... and {len(reasons) - LISTED} more"] if len(reasons) > LISTED else [])
    return UserError(
        data_dir,
        f"{len(reasons)} of {asked} shards could not be prepared"
        + (f"; {finished} are finished and kept" if finished else ""),
        fix="Mend these or take them away, and run the same command again:\n  " + "\n  ".join(listed),
    )


def _manifest(encoder: Encoder, heldout_fraction: float, records: dict[str, list[ShardRecord]]) -> CorpusManifest:
    sources = {}
    for name, group in records.items():
        sources[name] = SourceManifest(
            column=group[0].options.column,
            holds_ids=group[0].options.holds_ids,
            inputs=[record.input for record in group],
            train=[record.train for record in group if record.train],
            heldout=[record.heldout for record in group if record.heldout],
        )
        if not sources[name].train:
            rows = sum(entry.rows for entry in sources[name].inputs)
            raise UserError(
                f"data.sources.{name}",
                f"has no document to train on: {rows:,} rows in {len(group)} shards, {sources[name].skipped_rows()}, "
                f"{sources[name].documents('heldout'):,} held out",
                "at least one document that is not held out",
            )
    return CorpusManifest(
        tokenizer_fingerprint=encoder.fingerprint,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        dtype=token_dtype_name(encoder.vocab_size),
        heldout_fraction=heldout_fraction,
        sources=sources,
    )
