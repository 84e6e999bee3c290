"""The order in which a phase reads the windows of one source: shuffled within stretches of the source's own order."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from yxanul_nemo.data.permutation import KeyedPermutation
from yxanul_nemo.data.source import ShuffledSource


class PlannedWindows(NamedTuple):
    """What a phase was to read of a source, from one of its windows on."""

    first: int
    """Windows of the source that the phase had read when this was planned."""
    end: int
    """Windows of the source that the whole phase was then to read."""


class WindowOrder:
    """The windows that a phase reads of a source, by their number.

    The phase takes the windows of the source's order from a position on, so that no token is read twice in an epoch. It reads them
    stretch by stretch: `shuffle_tokens` of them, fewer at the end of an epoch and of the phase, in random order. A step thus has
    windows from all over a stretch and not neighbours. Where the plan changes in the middle of a phase, the stretches that were begun
    stay as they were.

    Args:
        source: the source.
        position: where the phase begins in it.
        seq_len: tokens of a window.
        plans: what was to be read, first as the phase began and then after each change.
        shuffle_tokens: tokens of a stretch; one window or less means the source's own order.
    """

    def __init__(
        self,
        source: ShuffledSource,
        position: int,
        seq_len: int,
        plans: Sequence[PlannedWindows],
        shuffle_tokens: int,
    ):
        self.source, self.position, self.seq_len = source, position, seq_len
        self.end = plans[-1].end
        """Windows that the phase is to read."""
        self.bounds: np.ndarray | None = None
        """[stretches + 1] int64: numbers of the windows at which stretches begin, and the end of the last one; None: not shuffled."""
        most = shuffle_tokens // seq_len
        if most > 1:
            left, per_epoch = source.windows_left(position, seq_len), source.windows_per_epoch(seq_len)
            self.bounds = np.array(_stretch_bounds(plans, most, left, per_epoch), dtype=np.int64)
        self._permutation: tuple[int, KeyedPermutation] | None = None
        self._asked_up_to = position
        """Position up to which the disk was asked for tokens."""

    def read(self, first: int, count: int) -> np.ndarray:
        """Return windows first .. first + count - 1, each with the token after it, [count, seq_len + 1] in the type of the files."""
        return self.source.read(self.places(first, count), self.seq_len + 1)

    def places(self, first: int, count: int) -> np.ndarray:
        """Return where windows first .. first + count - 1 begin in the source, counted from its first token, [count] int64."""
        return self.source.places(
            self.source.window_positions(self.position, self.seq_len, self._numbers(first, count))
        )

    def position_after(self, windows: int) -> int:
        """Return where the next phase begins if this one ends after its first `windows` windows: after the stretch of the last of them."""
        if self.bounds is not None:
            windows = int(self.bounds[np.searchsorted(self.bounds, windows, side="left")])
        return self.source.position_after(self.position, self.seq_len, windows)

    def _numbers(self, first: int, count: int) -> np.ndarray:
        """Return the numbers of windows in the source's order, counted from `position` on."""
        assert first + count <= self.end, "a phase reads no more than it planned"
        if self.bounds is None:
            return np.arange(first, first + count)
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            stretch = int(np.searchsorted(self.bounds, first + done, side="right")) - 1
            begin, end = int(self.bounds[stretch]), int(self.bounds[stretch + 1])
            n = min(count - done, end - first - done)
            in_stretch = np.arange(first + done - begin, first + done - begin + n)
            if self._permutation is None or self._permutation[0] != stretch:
                order = KeyedPermutation(end - begin, *self.source.key, "windows", self.position, self.seq_len, begin)
                self._permutation = stretch, order
                self._ask_for(begin, int(self.bounds[min(stretch + 2, len(self.bounds) - 1)]))
            out[done : done + n] = begin + self._permutation[1](in_stretch)
            done += n
        return out

    def _ask_for(self, first: int, end: int) -> None:
        """Have the disk begin to read windows first .. end - 1 of the source's order, as far as it was not asked before."""
        begin = int(self.source.window_positions(self.position, self.seq_len, np.array([first]))[0])
        up_to = self.source.position_after(self.position, self.seq_len, end)
        begin = max(begin, self._asked_up_to)
        if begin < up_to:
            self.source.will_need(begin, up_to)
            self._asked_up_to = up_to


def _stretch_bounds(plans: Sequence[PlannedWindows], most: int, left_in_epoch: int, per_epoch: int) -> list[int]:
    """Return where stretches of at most `most` windows begin, and the end of the last; none crosses the end of an epoch or of a plan."""
    bounds = [0]
    for number, plan in enumerate(plans):
        changed_at = plans[number + 1].first if number + 1 < len(plans) else plan.end
        while bounds[-1] < min(plan.end, changed_at):
            begin = bounds[-1]
            epoch_end = left_in_epoch
            if begin >= left_in_epoch:
                epoch_end += ((begin - left_in_epoch) // per_epoch + 1) * per_epoch
            bounds.append(min(begin + most, epoch_end, plan.end))
    return bounds
