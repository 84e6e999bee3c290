"""What a run in a folder has done so far, phase by phase: from the ledger of its newest checkpoint and from `metrics.jsonl`."""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.json_files import parse_json


@dataclass(frozen=True)
class PhaseDone:
    """What really happened in one phase."""

    tokens: int
    """Trained so far, by the newest record; those after the newest checkpoint included."""
    saved_tokens: int
    """Of them, in the newest checkpoint."""
    tokens_per_second_median: float | None
    """Over the records of the phase."""
    training_seconds: float | None
    """Time in training steps, from the tokens between records and their speed; without start-up and validation."""
    loss_nats_per_token: float | None
    """Of the phase's newest record."""


def phases_done(metrics: Path, ledger: Ledger | None, phases: list[Phase]) -> dict[int, PhaseDone]:
    """The phases that were begun, by number; reads, and changes nothing.

    Args:
        metrics: the run's records (`RunFolder.metrics`).
        ledger: of the newest checkpoint, None where there is none.
        phases: the curriculum, for where each phase begins.
    """
    saved = {record.index: record.consumed_tokens for record in ledger.phases} if ledger else {}
    records = _records_by_phase(metrics)
    done = {}
    for phase in phases:
        if phase.number not in saved and phase.number not in records:
            continue
        in_phase = records.get(phase.number, [])
        before, seconds = phase.first_token, 0.0
        for tokens_total, tokens_per_second, _ in in_phase:
            seconds += max(0, tokens_total - before) / tokens_per_second
            before = tokens_total
        done[phase.number] = PhaseDone(
            tokens=max(saved.get(phase.number, 0), before - phase.first_token),
            saved_tokens=saved.get(phase.number, 0),
            tokens_per_second_median=statistics.median(speed for _, speed, _ in in_phase) if in_phase else None,
            training_seconds=seconds if in_phase else None,
            loss_nats_per_token=in_phase[-1][2] if in_phase else None,
        )
    return done


def _records_by_phase(path: Path) -> dict[int, list[tuple[int, float, float | None]]]:
    """(tokens of the run, tokens/s, loss) of each record; a line that is being written just now is left out."""
    records: dict[int, list[tuple[int, float, float | None]]] = defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            record = parse_json(line)
            values = (int(record["tokens_total"]), float(record["tokens_per_second"]), record["loss_nats_per_token"])
            number = int(record["phase"])
        except (ValueError, KeyError, TypeError):
            continue
        if values[1] > 0:
            records[number].append(values)
    return records
