"""How long a run did not train: from the command to its first step, and from the last step of each phase to the first of the next.

    python -m benchmarks.phase_changes RUN_DIR

Read from what the run has written down. Train it in one go with `logging.every_steps=1`, so that the first record of a phase is about
its first step alone, in which CUDA graphs are recorded: the last column ends where this step ends. The command's time is that of
`environment.json`, about a second after its start, and a validation's is that of its file, which a copy of the folder may have lost.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from yxanul_nemo.json_files import parse_json
from yxanul_nemo.log import table_console
from yxanul_nemo.run_folder import RunFolder


@dataclass(frozen=True)
class Change:
    """The way into one phase, in seconds since the last step before it or, of the first one, since the command."""

    phase: int
    validated_seconds: float | None
    """To the result of the validation of the phase before."""
    began_seconds: float
    """To the beginning of the first step."""
    first_record_seconds: float
    """To the end of the steps that the first record is about."""


def read_changes(run_dir: Path) -> list[Change]:
    """Return what the records of a run say about the ways into its phases, in order."""
    folder = RunFolder(run_dir)
    records: dict[int, list[dict[str, Any]]] = {}
    for line in folder.metrics.read_text(encoding="utf-8").splitlines():
        record = parse_json(line)
        if "seconds_per_step" in record:
            records.setdefault(record["phase"], []).append(record)
    environment = parse_json(folder.environment.read_text(encoding="utf-8"))
    before = datetime.fromisoformat(environment["started"]).timestamp()
    changes = []
    for phase, of_phase in sorted(records.items()):
        first, result = of_phase[0], folder.phase_result(phase - 1)
        end = first["time_unix"]
        changes.append(
            Change(
                phase,
                result.stat().st_mtime - before if result.is_file() else None,
                end - first["steps"] * first["seconds_per_step"] - before,
                end - before,
            )
        )
        before = of_phase[-1]["time_unix"]
    return changes


def show(changes: Sequence[Change]) -> None:
    """Print a table."""
    table = Table(title="seconds without training")
    for column in ("phase", "validation done after", "first step begins after", "first record ends after"):
        table.add_column(column, justify="right")
    for change in changes:
        validated = "" if change.validated_seconds is None else f"{change.validated_seconds:.1f}"
        table.add_row(str(change.phase), validated, f"{change.began_seconds:.1f}", f"{change.first_record_seconds:.1f}")
    table_console().print(table)


def main(arguments: list[str]) -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    show(read_changes(parser.parse_args(arguments).run_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
