"""Windows of a phase: inputs and labels read from the sources, and the batches that ranks get of them."""

import itertools
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.data.blend import Blend
from yxanul_nemo.data.order import PlannedWindows, WindowOrder
from yxanul_nemo.data.source import ShuffledSource
from yxanul_nemo.read_ahead import read_ahead

STEPS_AHEAD = 4
"""Steps whose tokens are read before they are needed: windows lie in random places of files that may be on a slow disk."""


Batch = tuple[torch.Tensor, torch.Tensor]
"""A step's ids_ABT and labels_ABT, int64 [accumulation, micro_batch_size, seq_len]."""


@dataclass(frozen=True)
class BatchLayout:
    """How the windows of one optimizer step are spread over ranks and accumulated micro-batches."""

    micro_batch_size: int
    """Windows per rank and micro-batch."""
    accumulation: int
    """Micro-batches per step."""
    data_parallel: int
    """Ranks with different windows."""

    @property
    def windows_per_step(self) -> int:
        """Windows in one optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation * self.data_parallel


class Reading(NamedTuple):
    """What a phase reads from one of its windows on, until it is planned anew."""

    first_window: int
    """Window of the phase, from 0, from which this holds."""
    end_window: int
    """Windows of the whole phase."""
    shares: np.ndarray
    """Share of each source in the windows, summing to 1."""


class PhaseWindows:
    """All windows of one phase as a function of their number; the order does not depend on ranks or micro-batches.

    Args:
        sources: the corpora.
        start_positions: position in each source where the phase begins (what earlier phases have read of it).
        seq_len: length of a window.
        readings: what the phase reads, first as it began and then after each change of its plan.
        shuffle_tokens: tokens of each source within which windows come in random order.
    """

    def __init__(
        self,
        sources: Sequence[ShuffledSource],
        start_positions: Sequence[int],
        seq_len: int,
        readings: Sequence[Reading],
        shuffle_tokens: int,
    ):
        self.sources, self.seq_len, self.readings = list(sources), seq_len, list(readings)
        self.blends = [Blend(reading.shares) for reading in readings]
        # [readings, sources]: windows of each source before a reading begins.
        before = [np.zeros(len(sources), np.int64)]
        for (reading, after), blend in zip(itertools.pairwise(readings), self.blends[:-1], strict=True):
            before.append(before[-1] + blend.windows_before(after.first_window - reading.first_window))
        self._before = np.stack(before)
        ends = [
            counts + blend.windows_before(max(0, reading.end_window - reading.first_window))
            for counts, blend, reading in zip(before, self.blends, readings, strict=True)
        ]
        self.orders = [
            WindowOrder(
                source,
                start_positions[i],
                seq_len,
                [PlannedWindows(int(b[i]), int(e[i])) for b, e in zip(before, ends, strict=True)],
                shuffle_tokens,
            )
            for i, source in enumerate(sources)
        ]

    def read(
        self, first: int, count: int, into: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and labels [count, seq_len] int64 of windows first .. first + count - 1, in new arrays or in those of `into`.

        This is the one place where labels are shifted: the label of a token is the token after it in the source's files, also at the end of
        a window.
        """
        shape = count, self.seq_len
        inputs, labels = (np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)) if into is None else into
        assert inputs.shape == labels.shape == shape
        source_of = self.sources_of(first, count)
        before = self.windows_before(first)
        for source in np.unique(source_of).tolist():
            rows = np.flatnonzero(source_of == source)
            tokens = self.orders[source].read(int(before[source]), len(rows))
            if len(rows) == count:
                inputs[:], labels[:] = tokens[:, :-1], tokens[:, 1:]
            else:
                inputs[rows], labels[rows] = tokens[:, :-1], tokens[:, 1:]
        return inputs, labels

    def sources_of(self, first: int, count: int) -> np.ndarray:
        """Return the source index [count] of windows first .. first + count - 1."""
        out, done = [], 0
        while done < count:
            number = self._reading_of(first + done)
            begin, end = self.readings[number].first_window, self._end_of(number)
            n = min(count - done, end - first - done)
            out.append(self.blends[number].sources(first + done - begin, n))
            done += n
        return np.concatenate(out)

    def windows_before(self, window: int) -> np.ndarray:
        """Return how many windows [sources] come before window number `window` of the phase."""
        number = self._reading_of(window)
        return self._before[number] + self.blends[number].windows_before(window - self.readings[number].first_window)

    def tokens_per_source(self, windows: int) -> list[int]:
        """Return how many tokens the first `windows` windows of the phase take from each source."""
        return [int(n) * self.seq_len for n in self.windows_before(windows)]

    def positions_after(self, windows: int) -> list[int]:
        """Return the position in each source where the next phase begins if this one ends after its first `windows` windows."""
        return [o.position_after(int(n)) for o, n in zip(self.orders, self.windows_before(windows), strict=True)]

    def _reading_of(self, window: int) -> int:
        return max(i for i, reading in enumerate(self.readings) if reading.first_window <= window)

    def _end_of(self, number: int) -> int:
        later = self.readings[number + 1 :]
        return later[0].first_window if later else sys.maxsize


class PhaseBatches:
    """The steps `first_step` .. `last_step` - 1 of a phase, as one rank sees them.

    Yields pairs (ids_ABT, labels_ABT) of int64 tensors [accumulation, micro_batch_size, seq_len], read in a thread while earlier
    steps are computed.

    Args:
        pinned: read into pinned memory, from which this process's GPU copies while it computes. Pinning afterwards would copy on all
            cores in the thread that launches the GPU's work.
    """

    def __init__(
        self,
        windows: PhaseWindows,
        layout: BatchLayout,
        rank: int,
        first_step: int,
        last_step: int,
        pinned: bool = False,
    ):
        self.windows, self.layout, self.rank = windows, layout, rank
        self.first_step, self.last_step = first_step, last_step
        # A thread's own current GPU is the first.
        self._gpu = torch.cuda.current_device() if pinned else None

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Generator[Batch]:
        yield from read_ahead(map(self.batch, range(self.first_step, self.last_step)), STEPS_AHEAD)

    def batch(self, step: int) -> Batch:
        """The micro-batches of one step for this rank."""
        size, ranks, accumulation = self.layout.micro_batch_size, self.layout.data_parallel, self.layout.accumulation
        ids_ABT, labels_ABT = (self._empty(accumulation, size, self.windows.seq_len) for _ in range(2))
        for a in range(accumulation):
            first = step * self.layout.windows_per_step + (a * ranks + self.rank) * size
            self.windows.read(first, size, into=(ids_ABT[a].numpy(), labels_ABT[a].numpy()))
        return ids_ABT, labels_ABT

    def _empty(self, *shape: int) -> torch.Tensor:
        if self._gpu is None:
            return torch.empty(shape, dtype=torch.int64)
        with torch.cuda.device(self._gpu):
            return torch.empty(shape, dtype=torch.int64, pin_memory=True)


def corpus_shards(config: RunConfig, manifest: CorpusManifest) -> dict[str, list[IndexedTokens]]:
    """Return the files with the training documents of the configured sources of a prepared corpus."""
    return {
        name: [IndexedTokens(prefix) for prefix in manifest.prefixes(config.data_dir, name, "train")]
        for name in config.data.source_names
    }


def open_sources(
    shards_of: Mapping[str, Sequence[IndexedTokens]], seed: int, chunk_tokens: int
) -> list[ShuffledSource]:
    """Return one source for each name, each in an order of its own."""
    return [ShuffledSource(shards, (seed, name), chunk_tokens) for name, shards in shards_of.items()]
