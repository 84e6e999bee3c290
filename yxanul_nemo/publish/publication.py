"""What is published of a run: the files of its export, as the export recorded them, and the checkpoint that they are of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.export import HF_NAME
from yxanul_nemo.files import sha256_file
from yxanul_nemo.report.gather import Run, read_run

CARD_NAME = "README.md"
ANEW = "Export it with stage=export."


@dataclass(frozen=True)
class Publication:
    """An export that is whole, and what is known of its checkpoint."""

    run: Run
    checkpoint: Checkpoint
    ledger: Ledger
    """Of that checkpoint, which need not be the newest."""
    parity: Mapping[str, Mapping[str, Any]]
    """Name of an export -> what `check_parity` measured."""
    files: Mapping[str, Path]
    """Path in the repository -> file here; the card is not among them."""
    hashes: Mapping[str, str]
    """Path in the repository -> SHA-256, of the same files."""

    @property
    def card_path(self) -> Path:
        """The card that the export wrote."""
        return self.run.config.run.folder.export / HF_NAME / CARD_NAME


def read_publication(run_dir: Path) -> Publication:
    """Read the export in a run's folder and compare its files with the record.

    Raises:
        UserError: there is no run or no export with a Hugging Face folder, a file is not what was exported, or the checkpoint is gone.
    """
    run = read_run(run_dir)
    folder, record = run.config.run.folder, run.exported
    if record is None:
        raise UserError(run_dir, "has no export", "export/ with its export.json", ANEW)
    if HF_NAME not in record["parity"]:
        made = ", ".join(record["parity"])
        raise UserError(folder.export, f"holds only {made}", "hf among export.formats", ANEW)
    files, hashes = {}, {}
    for name, entry in record["files"].items():
        path, in_repo = folder.export / name, name.removeprefix(f"{HF_NAME}/")
        if in_repo == CARD_NAME:
            # A user may have added to it.
            continue
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            raise UserError(path, "is not the file that was exported", f"SHA-256 {entry['sha256']}", ANEW)
        files[in_repo], hashes[in_repo] = path, entry["sha256"]
    checkpoint = CheckpointStore.of_run(run.config, verify="size").find(record["checkpoint"])
    if checkpoint is None or checkpoint.manifest.digest != record["checkpoint_digest"]:
        raise UserError(
            folder.export, f"is of {record['checkpoint']}, which is not kept any more", "an export of a kept one", ANEW
        )
    found = Publication(run, checkpoint, checkpoint.read_ledger(), record["parity"], files, hashes)
    if not found.card_path.is_file():
        raise UserError(found.card_path, "does not exist", "the model card of the export", ANEW)
    return found
