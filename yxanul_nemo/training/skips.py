"""Updates that were skipped: which steps they were, and what those steps were trained on."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.data.windows import PhaseWindows
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.files import write_json_atomic


@dataclass(frozen=True)
class SkippedUpdate:
    """One of them, as the device remembers it."""

    steps_ago: int
    """Steps since then: 0 is the last step that was done."""
    loss: float
    """Nats per token."""
    grad_norm: float

    @property
    def reason(self) -> str:
        """In words."""
        finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        return "a spike" if finite else "not finite"


def skip_report_path(folder: Path, phase: Phase, first_step: int, last_step: int) -> Path:
    """File of `write_skip_report`."""
    return folder / f"phase-{phase.number:02d}-steps-{first_step}-{last_step}.json"


def write_skip_report(
    path: Path, phase: Phase, windows: PhaseWindows, source_names: Sequence[str], first_step: int, last_step: int
) -> None:
    """Write what the steps `first_step` to `last_step` of a phase (from 1) were trained on.

    For each step its windows (from 0, of the phase) and, by source, the documents that they are of, in the order of the windows:
    shard file, number in it, first token and tokens read. `data_prep.corpus.indexed.IndexedTokens(shard).document(number)` gives the
    ids of a document.
    """
    report = {
        "phase": phase.number,
        "seq_len": phase.seq_len,
        "tokens_per_step": phase.tokens_per_step,
        "steps": [_step(step, phase, windows, source_names) for step in range(first_step, last_step + 1)],
    }
    with disk_errors(path, "writing what skipped updates were about"):
        write_json_atomic(path, report)


def _step(step: int, phase: Phase, windows: PhaseWindows, source_names: Sequence[str]) -> dict[str, Any]:
    first, end = (step - 1) * phase.windows_per_step, step * phase.windows_per_step
    sources = {}
    before, after = windows.windows_before(first).tolist(), windows.windows_before(end).tolist()
    for name, order, begin, stop in zip(source_names, windows.orders, before, after, strict=True):
        if stop > begin:
            shards = order.source.shards
            # A copy, because batches are read ahead from the order itself in a thread.
            places = copy.copy(order).places(begin, stop - begin).tolist()
            sources[name] = {
                "documents": [
                    piece._asdict() | {"shard": str(shards[piece.shard].path_prefix)}
                    for place in places
                    for piece in order.source.documents(place, phase.seq_len)
                ],
            }
    return {
        "step_in_phase": step,
        "tokens_total": phase.first_token + step * phase.tokens_per_step,
        "windows": [first, end - 1],
        "sources": sources,
    }
