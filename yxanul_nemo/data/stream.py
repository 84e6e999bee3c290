"""One source as an endless stream of tokens: its documents in an order fixed by seed and epoch, each ended by EOS."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.corpus.indexed import IndexedTokens


class DocumentPiece(NamedTuple):
    """A part of one document in a stream."""

    epoch: int
    shard: int
    """Place of its file among the source's shards."""
    document: int
    """Number in that shard."""
    first_token: int
    """Of the document, from 0."""
    tokens: int


class TokenStream:
    """Random access by position into the concatenation of all epochs.

    Position p means the same token whatever the sequence length, the batch or the number of ranks, so a position is all that
    a checkpoint has to keep. Each epoch is a new permutation of all documents.
    """

    def __init__(self, shards: Sequence[IndexedTokens], seed: int):
        self.shards = list(shards)
        self.seed = seed
        self.begins = np.concatenate([shard.document_offsets[:-1] for shard in self.shards]).astype(np.int64)
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

    def pieces(self, start: int, count: int) -> Iterator[DocumentPiece]:
        """The documents that `read(start, count)` is made of, in order, each with the part of it that is read."""
        end = start + count
        while start < end:
            epoch, offset = divmod(start, self.tokens_per_epoch)
            self._enter(epoch)
            place = int(np.searchsorted(self._starts, offset, side="right")) - 1
            skipped = offset - int(self._starts[place])
            epoch_end = min(end, start - offset + self.tokens_per_epoch)
            while start < epoch_end:
                document = int(self._order[place])
                shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
                tokens = min(epoch_end - start, int(self.lengths[document]) - skipped)
                yield DocumentPiece(epoch, shard, document - int(self.first_document[shard]), skipped, tokens)
                start, skipped, place = start + tokens, 0, place + 1

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = rng.permutation(len(self.lengths))
            self._starts = np.concatenate([[0], np.cumsum(self.lengths[self._order])])
            self._epoch = epoch

    def _copy(self, offset: int, out: np.ndarray) -> None:
        first = int(np.searchsorted(self._starts, offset, side="right")) - 1
        last = int(np.searchsorted(self._starts, offset + len(out), side="left"))
        documents = self._order[first:last]
        starts = np.maximum(self._starts[first:last] - offset, 0)
        ends = np.minimum(self._starts[first + 1 : last + 1] - offset, len(out))
        begins = self.begins[documents]
        begins[0] += max(0, offset - int(self._starts[first]))
        shards = np.searchsorted(self.first_document, documents, side="right") - 1
        # Plain numbers: what NumPy needs to make one of its own would be most of the time for short documents.
        places = zip(shards.tolist(), begins.tolist(), starts.tolist(), ends.tolist(), strict=True)
        for shard, begin, start, end in places:
            out[start:end] = self.shards[shard].tokens[begin : begin + end - start]
