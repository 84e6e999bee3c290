"""Windows of a phase: inputs and labels cut from the sources' streams, and the batches that ranks get of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset

from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.data.blend import Blend
from yxanul_nemo.data.stream import TokenStream
from yxanul_nemo.read_ahead import read_ahead

STEPS_AHEAD = 4
"""Steps whose tokens are read before they are needed: documents lie in random places of files that may be on a slow disk."""


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


class PhaseWindows:
    """All windows of one phase as a function of their number; the order does not depend on ranks or micro-batches.

    Args:
        streams: one stream per source.
        shares: share of each source in the phase's windows, summing to 1.
        start_tokens: position of each source's stream where the phase begins (what earlier phases have read of it).
        seq_len: length of a window.
    """

    def __init__(self, streams: Sequence[TokenStream], shares: np.ndarray, start_tokens: Sequence[int], seq_len: int):
        self.streams, self.start_tokens, self.seq_len = list(streams), list(start_tokens), seq_len
        self.blend = Blend(shares)

    def read(
        self, first: int, count: int, into: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels [count, seq_len] int64 of windows first .. first + count - 1, in new arrays or in those of `into`.

        This is the one place where labels are shifted: the label of a token is the token after it in the stream,
        also at the end of a window, where it is the first token of the source's next window.
        """
        shape = count, self.seq_len
        inputs, labels = (np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)) if into is None else into
        assert inputs.shape == labels.shape == shape
        source_of = self.blend.sources(first, count)
        before = self.blend.windows_before(first)
        for source in np.unique(source_of):
            rows = np.flatnonzero(source_of == source)
            position = self.start_tokens[source] + int(before[source]) * self.seq_len
            tokens = self.streams[source].read(position, len(rows) * self.seq_len + 1)
            inputs[rows] = tokens[:-1].reshape(len(rows), self.seq_len)
            labels[rows] = tokens[1:].reshape(len(rows), self.seq_len)
        return inputs, labels

    def tokens_per_source(self, windows: int) -> list[int]:
        """Tokens that the first `windows` windows of the phase take from each source."""
        return [int(n) * self.seq_len for n in self.blend.windows_before(windows)]


class PhaseBatches(IterableDataset):
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

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from read_ahead(map(self.batch, range(self.first_step, self.last_step)), STEPS_AHEAD)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def corpus_streams(config: RunConfig, manifest: CorpusManifest) -> list[TokenStream]:
    """The training documents of the configured sources in a prepared corpus, a stream for each."""
    shards_of = {
        name: [IndexedTokens(prefix) for prefix in manifest.prefixes(config.data_dir, name, "train")]
        for name in config.data.source_names
    }
    return open_streams(shards_of, config.data.seed)


def open_streams(shards_of: Mapping[str, Sequence], seed: int) -> list[TokenStream]:
    """One stream per source, each with its own document order."""
    return [TokenStream(shards, seed=seed + 1_000_003 * i) for i, shards in enumerate(shards_of.values())]
