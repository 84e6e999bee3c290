"""The folder of a run's checkpoints: each appears whole or not at all, and none goes before a better one is there.

Layout of the folder::

    tokens_000000000163840/       a checkpoint: the trainer's files, ledger.json, manifest.json
    tokens_000000000163840.old/   the one it replaces, only for the moment of the replacement
    tokens_000000000163840.bad-1/ a damaged one that stood where a new one was committed; kept, but never read
    .tmp-...                      unfinished saves and deletions; `clean_temporaries` removes them
    latest, best                  text pointers for people and tools; resuming goes by the checkpoints themselves

One process writes at a time (see `yxanul_nemo.lock`). Order is by tokens; the clock decides nothing.
"""

import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yxanul_nemo.checkpoint.best import BEST_NAME, BestPointer
from yxanul_nemo.checkpoint.committed import CHECKPOINT_NAME, MAX_TOKENS, Checkpoint, checkpoint_name, load_checkpoint
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.manifest import (
    LEDGER_NAME,
    MANIFEST_NAME,
    CorruptCheckpoint,
    Verify,
    seal,
    verify_files,
)
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fsync_dir, write_text_atomic
from yxanul_nemo.log import logger

TEMPORARY_PREFIX = ".tmp-"
LATEST_NAME = "latest"
OLD_SUFFIX = ".old"

_POINTER_TEMPORARY = re.compile(rf"\.({LATEST_NAME}|{BEST_NAME})\..+\.tmp")
_SAVING = "saving a checkpoint"
_FIX_SAVING = "Training goes on from the last checkpoint; fewer are kept with a smaller checkpoint.keep_latest."


class CheckpointStore:
    """Commits, verifies, finds and rotates the checkpoints of one run.

    Args:
        root: folder of the checkpoints; made by the first `begin`.
        keep_latest: newest checkpoints that rotation keeps, beside the best one and, with `keep_phase_ends`, every end of a phase.
        verify: what is checked before a checkpoint is handed out: `full`, the SHA-256 of every file; `size`, the sizes
            (and the SHA-256 of small files).
    """

    def __init__(self, root: Path, keep_latest: int = 3, verify: Verify = "full", keep_phase_ends: bool = True):
        if keep_latest < 1:
            raise UserError("checkpoint.keep_latest", f"got {keep_latest}", "at least 1")
        self.root = Path(root)
        self.keep_latest = keep_latest
        self.verify: Verify = verify
        self.keep_phase_ends = keep_phase_ends

    @classmethod
    def of_run(cls, config: RunConfig, verify: Verify | None = None) -> "CheckpointStore":
        """The checkpoints of a run, kept and (unless `verify` says otherwise) checked as it asks for."""
        kept = config.checkpoint
        return cls(config.run.folder.checkpoints, kept.keep_latest, verify or kept.verify, kept.keep_phase_ends)

    def begin(self, tokens: int) -> Path:
        """Make a fresh temporary directory for the state after `tokens`; any rank may write files and folders into it.

        Raises:
            UserError: the folder cannot be written.
        """
        assert 0 <= tokens <= MAX_TOKENS, tokens
        temporary = self.root / f"{TEMPORARY_PREFIX}{checkpoint_name(tokens)}-{secrets.token_hex(4)}"
        with disk_errors(self.root, _SAVING, _FIX_SAVING):
            if not self.root.is_dir():
                self.root.mkdir(parents=True)
                fsync_dir(self.root.parent)
            temporary.mkdir()
        return temporary

    @contextmanager
    def writing(self, temporary: Path, *library_errors: type[Exception]) -> Iterator[None]:
        """Around the writing of files into a directory of `begin`: if it fails, the directory is removed.

        Args:
            temporary: a directory of `begin`.
            library_errors: exceptions by which a library reports what the disk refused, as `safetensors.SafetensorError`.

        Raises:
            UserError: disk full and the like (from `OSError` and `library_errors`); all else passes unchanged.
        """
        try:
            with disk_errors(self.root, _SAVING, _FIX_SAVING, library_errors):
                yield
        except BaseException:
            self.abandon(temporary)
            raise

    def abandon(self, temporary: Path) -> None:
        """Remove the directory of a save that failed; does nothing if it is gone."""
        assert temporary.parent == self.root and temporary.name.startswith(TEMPORARY_PREFIX), temporary
        _remove_tree(temporary)

    def commit(self, temporary: Path, ledger: Ledger, phase_end: bool) -> Checkpoint:
        """Turn a directory of `begin` into the checkpoint `tokens_<15 digits>`, point `latest` to it, and rotate.

        All files are on disk before the directory gets its name. If there is one of the same tokens already, the new
        one takes its place, with one exception: a good end of a phase is not replaced by a checkpoint that is none (its
        state is the same, and the mark would be lost); it is returned instead. A damaged one is renamed to `.bad-N`.

        Raises:
            UserError: disk full, folder not writable and the like. The temporary directory is removed and older
                checkpoints are as they were. If only the pointer could not be written, the checkpoint is committed.
        """
        tokens = ledger.tokens_total
        assert temporary.name.startswith(f"{TEMPORARY_PREFIX}{checkpoint_name(tokens)}-"), (
            f"{temporary}: {tokens} tokens"
        )
        with self.writing(temporary):
            ledger.write(temporary / LEDGER_NAME)
            seal(temporary, tokens, ledger.phase, phase_end)
            committed = self._publish(temporary, tokens, phase_end)
        with disk_errors(self.root, "rotating checkpoints", f"The checkpoint {committed.path} itself is complete."):
            try:
                write_text_atomic(self.root / LATEST_NAME, f"{committed.path.name}\n")
            finally:
                self._rotate(committed)
        return committed

    def list(self) -> list[Checkpoint]:
        """Checkpoints with a valid manifest, in order of tokens. Their other files are not looked at."""
        found = []
        for path in _candidates(self.root):
            try:
                found.append(load_checkpoint(path))
            except CorruptCheckpoint:
                continue
        return found

    def check(self, checkpoint: Checkpoint) -> None:
        """Compare a checkpoint on disk with its manifest, as thoroughly as `verify` says.

        Raises:
            CorruptCheckpoint: names the first wrong file and what is wrong with it.
        """
        if load_checkpoint(checkpoint.path).manifest != checkpoint.manifest:
            raise CorruptCheckpoint(checkpoint.path, MANIFEST_NAME, "is not the one that was read before")
        verify_files(checkpoint.path, checkpoint.manifest, self.verify)

    def newest_good(self, phase_end_of: int | None = None) -> Checkpoint | None:
        """The checkpoint to go on from: the one of most tokens that passes `check`.

        Each bad one is named in the log with the reason and skipped; it stays where it is.

        Args:
            phase_end_of: only the end of the phase of this number, counted from 1.

        Returns:
            None if nothing was ever committed (or no end of that phase).

        Raises:
            UserError: there are committed checkpoints, but all of them are damaged. Starting anew is left to the user.
        """
        bad: list[CorruptCheckpoint] = []
        for path in reversed(_candidates(self.root)):
            try:
                checkpoint = load_checkpoint(path)
                if phase_end_of is not None and (not checkpoint.phase_end or checkpoint.phase != phase_end_of):
                    continue
                self.check(checkpoint)
            except CorruptCheckpoint as error:
                logger.warning("skipping bad checkpoint %s: %s %s", path.name, error.file, error.why)
                if (path / MANIFEST_NAME).exists():
                    bad.append(error)
                continue
            return checkpoint
        if bad and phase_end_of is None:
            reasons = "; ".join(f"{error.directory.name}/{error.file} {error.why}" for error in bad)
            raise UserError(
                self.root,
                f"none of its {len(bad)} checkpoints can be used ({reasons})",
                "at least one good checkpoint",
                "Restore one from a copy, or move this folder away to start from the beginning.",
            )
        return None

    def find(self, which: str) -> Checkpoint | None:
        """The checkpoint that is meant by `latest`, `best` or the name of its folder; None if there is none.

        `latest` and `best` pass `check`; of a named one only the manifest is looked at.

        Raises:
            UserError: as `newest_good`.
        """
        if which == LATEST_NAME:
            return self.newest_good()
        if which == BEST_NAME:
            return self.best()
        return next((checkpoint for checkpoint in self.list() if checkpoint.path.name == which), None)

    def choose(self, which: str, key: str = "checkpoint") -> Checkpoint:
        """The checkpoint that is meant by `latest`, `best` or the name of its folder, checked.

        Args:
            which: one of the three.
            key: of the configuration, that `which` is the value of.

        Raises:
            UserError: there is none, or it is damaged.
        """
        found = self.find(which)
        if which not in (LATEST_NAME, BEST_NAME):
            if found is None:
                raise UserError(self.root / which, "is no complete checkpoint", "a folder that training committed")
            self.check(found)
        if found is not None:
            return found
        if which == LATEST_NAME or self.newest_good() is None:
            raise self.no_checkpoint()
        raise UserError(
            key,
            f"is best, but {self.root / BEST_NAME} names no good checkpoint",
            LATEST_NAME,
            "The best checkpoint is chosen by the validation at the end of each phase.",
        )

    def no_checkpoint(self) -> UserError:
        """The mistake of asking for a checkpoint before there is one."""
        return UserError(self.root, "holds no checkpoint", fix="Run `python launcher.py stage=train` first.")

    def mark_best(self, checkpoint: Checkpoint, metric: str, value: float) -> None:
        """Point `best` to `checkpoint` if `value` is lower than that of the present best (or there is none).

        Args:
            checkpoint: a committed checkpoint.
            metric: what `value` measures; a change of metric starts afresh.
            value: lower is better; not a number or infinite is never best.
        """
        if not math.isfinite(value):
            logger.warning("checkpoint %s: %s is %s, not considered for best", checkpoint.path.name, metric, value)
            return
        present = BestPointer.read(self.root)
        if present is not None and present.metric == metric and present.value <= value:
            return
        name, digest = checkpoint.path.name, checkpoint.manifest.digest
        with disk_errors(self.root, "marking the best checkpoint"):
            BestPointer(checkpoint=name, digest=digest, metric=metric, value=value).write(self.root)

    def best(self) -> Checkpoint | None:
        """The checkpoint that `mark_best` chose, if it passes `check`; otherwise None, with the reason in the log."""
        pointer = BestPointer.read(self.root)
        if pointer is None:
            return None
        try:
            checkpoint = load_checkpoint(self.root / pointer.checkpoint)
            self.check(checkpoint)
        except CorruptCheckpoint as error:
            logger.warning("the best checkpoint cannot be used: %s", error)
            return None
        return checkpoint

    def clean_temporaries(self) -> None:
        """Remove what killed saves and deletions left. Call it before the first `begin`, under the run's lock."""
        if not self.root.is_dir():
            return
        with disk_errors(self.root, "removing unfinished checkpoints"):
            for path in sorted(self.root.iterdir()):
                if path.name.startswith(TEMPORARY_PREFIX) and path.is_dir() and not path.is_symlink():
                    logger.info("removing the unfinished %s", path)
                    _remove_tree(path)
                elif _POINTER_TEMPORARY.fullmatch(path.name):
                    path.unlink()

    def _publish(self, temporary: Path, tokens: int, phase_end: bool) -> Checkpoint:
        """Give a sealed directory its final name; a good one of the same tokens has a name that counts until then."""
        final = self.root / checkpoint_name(tokens)
        old = final.with_name(final.name + OLD_SUFFIX)
        if os.path.lexists(final):
            try:
                present = load_checkpoint(final)
                self.check(present)
            except CorruptCheckpoint as error:
                aside = _free_name(final)
                logger.warning("moving the bad checkpoint %s aside to %s: %s", final.name, aside.name, error)
                final.rename(aside)
            else:
                if present.phase_end and not phase_end:
                    logger.info("checkpoint %s is the end of a phase already and stays", final.name)
                    _remove_tree(temporary)
                    return present
                if old.exists():
                    self._delete(old)
                final.rename(old)
        temporary.rename(final)
        fsync_dir(self.root)
        if old.exists():
            self._delete(old)
        return load_checkpoint(final)

    def _rotate(self, newest: Checkpoint) -> None:
        """Delete whole checkpoints that nobody needs.

        Bad ones, and ones ahead of `newest` (bad as well, or training would have gone on from them), are not touched
        and do not count: they must not push good ones out.
        """
        whole = []
        for checkpoint in self.list():
            try:
                verify_files(checkpoint.path, checkpoint.manifest, "size")
            except CorruptCheckpoint:
                continue
            if checkpoint.tokens <= newest.tokens:
                whole.append(checkpoint)
        # Of the same tokens the replaced one comes first, so that the dictionary ends up with the one that counts.
        by_tokens = {checkpoint.tokens: checkpoint for checkpoint in whole}
        kept = {checkpoint.path for checkpoint in list(by_tokens.values())[-self.keep_latest :]} | {newest.path}
        if self.keep_phase_ends:
            kept |= {checkpoint.path for checkpoint in by_tokens.values() if checkpoint.phase_end}
        if (pointer := BestPointer.read(self.root)) is not None:
            kept.add(self.root / pointer.checkpoint)
        for checkpoint in whole:
            if checkpoint.path not in kept:
                self._delete(checkpoint.path)

    def _delete(self, path: Path) -> None:
        """Take the name away first, so that a kill leaves a temporary and never half a checkpoint."""
        doomed = self.root / f"{TEMPORARY_PREFIX}delete-{path.name}-{secrets.token_hex(4)}"
        path.rename(doomed)
        fsync_dir(self.root)
        _remove_tree(doomed)


def _candidates(root: Path) -> list[Path]:
    """Directories named like checkpoints, in order of tokens; of the same tokens, the replaced one first."""
    if not root.is_dir():
        return []
    named = [(match, path) for path in root.iterdir() if (match := CHECKPOINT_NAME.fullmatch(path.name))]
    named = [(match, path) for match, path in named if path.is_dir() and not path.is_symlink()]
    return [path for match, path in sorted(named, key=lambda pair: (int(pair[0][1]), pair[0][2] is None))]


def _free_name(final: Path) -> Path:
    number = 1
    while os.path.lexists(aside := final.with_name(f"{final.name}.bad-{number}")):
        number += 1
    return aside


def _remove_tree(path: Path) -> None:
    """Delete a temporary directory. What cannot be deleted now is named in the log and left to `clean_temporaries`."""

    def failed(_function: object, name: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            logger.warning("could not remove %s: %s", name, error)

    shutil.rmtree(path, onexc=failed)
