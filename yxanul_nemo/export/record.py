"""What was exported from which checkpoint, so that a repeated command knows. Light, for the launcher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.export.publish import FileRecord
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.json_files import parse_json


def is_exported(config: RunConfig, newest: Checkpoint) -> bool:
    """Whether the export of the configured checkpoint in the configured formats is complete.

    Args:
        newest: the run's newest checkpoint, which is the one to export unless `export.checkpoint` names another.
    """
    which = config.export.checkpoint
    wanted = newest if which == "latest" else CheckpointStore.of_run(config, verify="size").find(which)
    if wanted is None:
        return False
    folder = config.run.folder.export
    try:
        record = parse_json(config.run.folder.export_record.read_text(encoding="utf-8"))
        return (
            record["checkpoint_digest"] == wanted.manifest.digest
            and record["settings"] == _settings(config)
            and all((folder / name).stat().st_size == entry["bytes"] for name, entry in record["files"].items())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # Absent, damaged, or of another version of the project: exported anew.
        return False


def write_record(
    config: RunConfig, checkpoint: Checkpoint, folder: Path, files: Mapping[str, FileRecord], parity: dict[str, Any]
) -> None:
    """Write `export.json`; the last thing an export does.

    Args:
        files: path relative to `folder` -> what the file is.
        parity: format -> what `check_parity` measured.
    """
    record = {
        "checkpoint": checkpoint.path.name,
        "checkpoint_digest": checkpoint.manifest.digest,
        "tokens_total": checkpoint.tokens,
        "settings": _settings(config),
        "parity": parity,
        "files": files,
    }
    write_json_atomic(folder / config.run.folder.export_record.name, record)


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.export.model_dump(mode="json")
