"""One committed checkpoint: the name of its folder, and what its manifest says."""

import re
from dataclasses import dataclass
from pathlib import Path

from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.manifest import LEDGER_NAME, MANIFEST_NAME, CorruptCheckpoint, Manifest, read_manifest

MAX_TOKENS = 10**15 - 1
CHECKPOINT_NAME = re.compile(r"tokens_([0-9]{15})(\.old)?")


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    path: Path
    tokens: int
    """Tokens consumed by the run."""
    phase: int
    """Number of the curriculum's phase, counted from 1."""
    phase_end: bool
    """Whether that phase was finished."""
    created_unix: float
    """Wall-clock time of the commit in seconds, for people only."""
    manifest: Manifest

    def read_ledger(self) -> Ledger:
        """The ledger in it; raises `UserError` if it is damaged."""
        return Ledger.read(self.path / LEDGER_NAME)


def checkpoint_name(tokens: int) -> str:
    """Return the name of the folder of a checkpoint after so many tokens of the run."""
    return f"tokens_{tokens:015d}"


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder by its manifest; its other files are not looked at.

    Raises:
        CorruptCheckpoint: as `read_manifest`, or the manifest is that of a folder of another name.
    """
    manifest = read_manifest(path)
    match = CHECKPOINT_NAME.fullmatch(path.name)
    if match is None or int(match[1]) != manifest.tokens:
        raise CorruptCheckpoint(path, MANIFEST_NAME, f"is that of a checkpoint after {manifest.tokens} tokens")
    return Checkpoint(
        path=path,
        tokens=manifest.tokens,
        phase=manifest.phase,
        phase_end=manifest.phase_end,
        created_unix=manifest.created_unix,
        manifest=manifest,
    )
