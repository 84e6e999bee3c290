"""What was exported from which checkpoint, so that a repeated command knows. Light, for the launcher."""

import json
from pathlib import Path
from typing import Any

from yxanul_nemo.checkpoint.store import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.files import write_json_atomic

RECORD_NAME = "export.json"


def is_exported(config: RunConfig, checkpoint: Checkpoint) -> bool:
    """Whether the export of this checkpoint in the configured formats is complete."""
    folder = config.run.dir / "export"
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(record, dict)
        and record.get("checkpoint_digest") == checkpoint.manifest.digest
        and record.get("settings") == _settings(config)
        and all((folder / name).is_file() for name in record.get("files", {}))
    )


def write_record(
    config: RunConfig, checkpoint: Checkpoint, folder: Path, files: dict[str, Any], parity: dict[str, Any]
) -> None:
    """Write `export.json`; the last thing an export does."""
    record = {
        "checkpoint": checkpoint.path.name,
        "checkpoint_digest": checkpoint.manifest.digest,
        "tokens_total": checkpoint.tokens,
        "settings": _settings(config),
        "parity": parity,
        "files": files,
    }
    write_json_atomic(folder / RECORD_NAME, record)


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.export.model_dump(mode="json")
