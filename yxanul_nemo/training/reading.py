"""What a phase reads: the windows that follow from the ledger, and the plan that the ledger keeps of them."""

from collections.abc import Sequence

import numpy as np

from yxanul_nemo.checkpoint.ledger import Ledger, PhaseRecord, ReadingRecord
from yxanul_nemo.data.source import ShuffledSource
from yxanul_nemo.data.windows import PhaseWindows, Reading


def plan_reading(ledger: Ledger, names: Sequence[str], shares: np.ndarray) -> Ledger:
    """Return the ledger with what its current phase reads from here on, where that is new or has changed.

    Args:
        names: the sources.
        shares: share of each in the phase's windows, summing to 1.
    """
    record = ledger.current
    assert record is not None, "a phase was begun"
    return ledger.with_reading(
        ReadingRecord(
            first_window=record.consumed_tokens // record.seq_len,
            end_window=record.planned_tokens // record.seq_len,
            shares=dict(zip(names, shares.tolist(), strict=True)),
        )
    )


def current_windows(
    ledger: Ledger, names: Sequence[str], sources: Sequence[ShuffledSource], shuffle_tokens: int
) -> PhaseWindows:
    """Return the windows of the ledger's current phase, which begins where the phases before it ended.

    Args:
        names: the sources' names.
        sources: the same sources, opened.
        shuffle_tokens: `data.shuffle_tokens`.
    """
    assert ledger.current is not None, "a phase was begun"
    positions = [0] * len(names)
    for record in ledger.phases[:-1]:
        windows = _windows(record, names, sources, positions, shuffle_tokens)
        positions = windows.positions_after(record.consumed_tokens // record.seq_len)
    return _windows(ledger.current, names, sources, positions, shuffle_tokens)


def _windows(
    record: PhaseRecord,
    names: Sequence[str],
    sources: Sequence[ShuffledSource],
    positions: Sequence[int],
    shuffle_tokens: int,
) -> PhaseWindows:
    readings = [
        Reading(reading.first_window, reading.end_window, _shares(reading, names)) for reading in record.readings
    ]
    return PhaseWindows(sources, positions, record.seq_len, readings, shuffle_tokens)


def _shares(reading: ReadingRecord, names: Sequence[str]) -> np.ndarray:
    """Return the share of each source; one that came later has none."""
    assert reading.shares.keys() <= set(names), "sources that were read stay in the configuration"
    return np.array([reading.shares.get(name, 0.0) for name in names])
