"""`stage=branch`: a new run that begins from a checkpoint of another one, with its moments, its place in the data and its history."""

import shutil
from pathlib import Path
from typing import NamedTuple

from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.going_on import differences, gone_on
from yxanul_nemo.checkpoint.identity import expected_run
from yxanul_nemo.checkpoint.ledger import Ledger, LineageRecord, replaced
from yxanul_nemo.checkpoint.manifest import LEDGER_NAME, MANIFEST_NAME
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.base import number_written
from yxanul_nemo.config.load import load_run_config, to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import check_enough_tokens, plan_phases, source_sizes
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.lock import RunLock
from yxanul_nemo.log import logger
from yxanul_nemo.run_folder import RunFolder
from yxanul_nemo.validation.record import read_tokens

CONFIG_NAME = "config.yaml"


class Parent(NamedTuple):
    """A checkpoint of another run."""

    run_dir: Path
    checkpoint: Checkpoint


def parent_of(source: str) -> Parent:
    """Return the checkpoint that `from=RUN[@TOKENS]` means; without tokens the newest.

    Raises:
        UserError: there is no such run, or it keeps no checkpoint after so many tokens; names those that it keeps.
    """
    folder, at, written = source.rpartition("@")
    if not at:
        folder, written = source, ""
    store = CheckpointStore(RunFolder(Path(folder)).checkpoints)
    kept = store.list()
    if not kept:
        raise UserError(
            "from", f"is {source}, and {folder} holds no checkpoint", "RUN or RUN@TOKENS", "Name a run's folder."
        )
    if not written:
        newest = store.newest_good()
        assert newest is not None
        return Parent(Path(folder), newest)
    tokens = number_written(written)
    found = next((one for one in kept if one.tokens == tokens), None)
    if found is None:
        there = ", ".join(f"{one.tokens}" for one in kept)
        raise UserError("from", f"is {source}, a checkpoint that is not kept", f"{folder}@ and one of {there}")
    store.check(found)
    return Parent(Path(folder), found)


def parent_settings(parent: Parent, own: RunConfig) -> RunConfig:
    """Return the settings that a branch begins with: those of the checkpoint, with the parent's tokens.

    Args:
        own: the parent's settings now.
    """
    then = load_run_config(parent.checkpoint.path / CONFIG_NAME)
    return then.model_copy(
        update={
            # The checkpoint's own have the numbers that were found where these say auto.
            "precision": own.precision,
            "parallel": own.parallel,
            "data": then.data.model_copy(update={"dir": own.data_dir.resolve()}),
        }
    )


def run_branch_stage(config: RunConfig) -> None:
    """Begin the run `config` from the checkpoint that `from` names.

    Raises:
        UserError: `run.dir` has begun already, the corpus is another one, or a setting differs that cannot change.
    """
    if len(config.sources) != 1:
        raise UserError("from", "is not one run", "RUN or RUN@TOKENS", "As in stage=branch from=runs/a@100000.")
    parent = parent_of(str(config.sources[0]))
    folder = config.run.folder
    lineage = LineageRecord(
        run=parent.run_dir.resolve().name,
        at_tokens=parent.checkpoint.tokens,
        digest=parent.checkpoint.manifest.digest,
    )
    ledger = _branched(config, parent, lineage)
    with RunLock(config.run.dir), disk_errors(folder.root, "branching a run"):
        store = CheckpointStore.of_run(config)
        store.clean_temporaries()
        begun = store.newest_good()
        if begun is not None and (folder.config.exists() or begun.read_ledger().lineage[-1:] != (lineage,)):
            raise UserError(
                folder.root,
                "has begun already",
                "a new folder",
                f"To go on with it: python launcher.py run.dir={folder.root}.",
            )
        shutil.copytree(RunFolder(parent.run_dir).tokenizer, folder.tokenizer, dirs_exist_ok=True)
        _copy_history(parent, folder)
        _copy_checkpoint(config, parent.checkpoint, ledger, store)
        # Last, because a run has begun by it: a branch that was killed before is begun again by the same command.
        write_text_atomic(folder.config, to_yaml(config))
    for change in ledger.changes[len(parent.checkpoint.read_ledger().changes) :]:
        logger.info("from here on: %s", change.key)
    logger.info(
        "%s begins from %s after %s tokens, in phase %d; to train: python launcher.py run.dir=%s",
        folder.root,
        parent.run_dir,
        f"{ledger.tokens_total:,}",
        ledger.phase,
        folder.root,
    )


def _branched(config: RunConfig, parent: Parent, lineage: LineageRecord) -> Ledger:
    """Return the ledger that the branch begins with; a branch may change all that is to come."""
    manifest = load_manifest(config.data_dir)
    phases = plan_phases(config.curriculum)
    check_enough_tokens(config, phases, source_sizes(config, manifest))
    expected, before = expected_run(config, manifest, phases), parent.checkpoint.read_ledger()
    allow = {one.key for one in differences(before, expected) if not one.firm}
    ledger = gone_on(before, expected, sorted(allow), parent.checkpoint.path)
    return replaced(ledger, lineage=(*ledger.lineage, lineage))


def _copy_history(parent: Parent, folder: RunFolder) -> None:
    """Copy records and validations up to the checkpoint, which blends and an early stop follow from."""
    theirs, tokens = RunFolder(parent.run_dir), parent.checkpoint.tokens
    if theirs.metrics.is_file():
        lines = theirs.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (at := _tokens_of(line)) is not None and at <= tokens]
        write_text_atomic(folder.metrics, "".join(f"{line}\n" for line in kept))
    for path in sorted(theirs.validation.glob("phase-*.json")):
        made = read_tokens(path)
        if made is not None and made <= tokens:
            folder.validation.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder.validation / path.name)


def _tokens_of(line: str) -> int | None:
    try:
        return int(parse_json(line)["tokens_total"])
    except (ValueError, LookupError, TypeError):
        # A line that was being written when the machine went down.
        return None


def _copy_checkpoint(config: RunConfig, checkpoint: Checkpoint, ledger: Ledger, store: CheckpointStore) -> None:
    place = store.begin(checkpoint.tokens)
    with store.writing(place):
        for path in sorted(checkpoint.path.iterdir()):
            if path.name not in (LEDGER_NAME, MANIFEST_NAME, CONFIG_NAME) and path.name in checkpoint.manifest.files:
                shutil.copyfile(path, place / path.name)
        (place / CONFIG_NAME).write_text(to_yaml(config), encoding="utf-8")
    is_end = checkpoint.phase_end and ledger.current is not None and ledger.current.finished
    store.commit(place, ledger, phase_end=is_end)
