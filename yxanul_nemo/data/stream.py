"""One source as an endless stream of tokens: its documents in an order fixed by seed and epoch, each ended by EOS."""

from collections.abc import Sequence

import numpy as np

from data_prep.indexed import IndexedTokens


class TokenStream:
    """Random access by position into the concatenation of all epochs.

    Position p means the same token whatever the sequence length, the batch or the number of ranks, so a position is all that
    a checkpoint has to keep. Each epoch is a new permutation of all documents.
    """

    def __init__(self, shards: Sequence[IndexedTokens], seed: int):
        self.shards = list(shards)
        self.seed = seed
        self.lengths = np.concatenate([np.diff(shard.document_offsets) for shard in self.shards]).astype(np.int64)
        self.first_document = np.cumsum([0] + [len(shard.document_offsets) - 1 for shard in self.shards])
        self.tokens_per_epoch = int(self.lengths.sum())
        assert self.tokens_per_epoch > 0, "a source without tokens is refused before training"
        self._epoch = -1

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [count] int64 from position `start` on, over document and epoch boundaries."""
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(start + filled, self.tokens_per_epoch)
            self._enter(epoch)
            n = min(count - filled, self.tokens_per_epoch - offset)
            self._copy(offset, out[filled : filled + n])
            filled += n
        return out

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = rng.permutation(len(self.lengths))
            self._starts = np.concatenate([[0], np.cumsum(self.lengths[self._order])])
            self._epoch = epoch

    def _copy(self, offset: int, out: np.ndarray) -> None:
        place = int(np.searchsorted(self._starts, offset, side="right")) - 1
        filled = 0
        while filled < len(out):
            document = int(self._order[place])
            shard_index = int(np.searchsorted(self.first_document, document, side="right")) - 1
            shard = self.shards[shard_index]
            begin = int(shard.document_offsets[document - self.first_document[shard_index]])
            skip = offset + filled - int(self._starts[place])
            n = min(len(out) - filled, int(self.lengths[document]) - skip)
            out[filled : filled + n] = shard.tokens[begin + skip : begin + skip + n]
            filled += n
            place += 1
