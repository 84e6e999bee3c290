"""Results of validation on disk: which belong to a checkpoint and to the settings now in force. Light, for the launcher."""

import json
from pathlib import Path
from typing import Any

from yxanul_nemo.checkpoint.store import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.files import fingerprint


def phase_result_path(run_dir: Path, number: int) -> Path:
    """The validation at the end of a phase."""
    return run_dir / "validation" / f"phase-{number:02d}.json"


def checkpoint_result_path(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """The validation of a checkpoint by `stage=validate`."""
    return run_dir / "validation" / f"{checkpoint.path.name}.json"


def settings_fingerprint(config: RunConfig) -> str:
    """Of the settings that a result depends on."""
    settings = config.validation.model_dump(mode="json", exclude={"batch_tokens", "dir"})
    return fingerprint(settings | {"dir": str(config.validation.dir)})


def find_result(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """A result of this checkpoint under the present settings, or None."""
    wanted = {"checkpoint_digest": checkpoint.manifest.digest, "settings_fingerprint": settings_fingerprint(config)}
    for path in sorted((config.run.dir / "validation").glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(result, dict) and wanted.items() <= result.items():
            return result
    return None
