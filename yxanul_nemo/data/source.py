"""One source's tokens in the order in which a run reads them: chunks of neighbouring tokens, in another order in each epoch.

Nothing is stored for a document or for a chunk, so that a source of a billion documents is opened as fast as a small one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.corpus.indexed import IndexedTokens
from yxanul_nemo.data.permutation import KeyedPermutation


class DocumentPiece(NamedTuple):
    """A part of one document that a window has."""

    shard: int
    """Place of its file among the source's shards."""
    document: int
    """Number in that shard."""
    first_token: int
    """Of the document, from 0."""
    tokens: int


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch: where chunks begin, and in which order they come."""

    first_token: int
    """Where the chunks begin in the source, whose end is followed by its beginning."""
    order: KeyedPermutation
    """Of the whole chunks; the rest, shorter than a chunk, comes last."""


class ShuffledSource:
    """Windows of any length by their number, as a pure function of seed, position and length.

    A position is a number of tokens in the order of reading, over all epochs. In an epoch the source is cut into chunks of
    `chunk_tokens`, which come in a random order. Windows are cut from chunks one after another and never cross the end of a chunk: what
    is left there is shorter than a window and is read in another epoch, whose chunks begin elsewhere. Lengths that divide
    `chunk_tokens` leave nothing.

    Args:
        shards: files of the source, in order; their tokens count as one sequence.
        key: what the order depends on beside the epoch: the run's seed and the source's name.
        chunk_tokens: tokens of a chunk, at least the longest window.
    """

    def __init__(self, shards: Sequence[IndexedTokens], key: tuple[str | int, ...], chunk_tokens: int):
        self.shards, self.key = list(shards), key
        self.first_token_of_shard = np.cumsum([0] + [len(shard.tokens) for shard in self.shards])
        self.tokens_per_epoch = int(self.first_token_of_shard[-1])
        assert self.tokens_per_epoch > 0, "a source without tokens is refused before training"
        self.chunk_tokens = min(chunk_tokens, self.tokens_per_epoch)
        self.whole_chunks, self.rest_tokens = divmod(self.tokens_per_epoch, self.chunk_tokens)
        self._epochs: dict[int, _Epoch] = {}

    def windows_per_epoch(self, seq_len: int) -> int:
        """Return how many windows of a length a whole epoch has."""
        return self.whole_chunks * (self.chunk_tokens // seq_len) + self.rest_tokens // seq_len

    def windows_left(self, position: int, seq_len: int) -> int:
        """Return how many windows of a length there are from a position to the end of its epoch."""
        offset = position % self.tokens_per_epoch
        chunk, used = divmod(offset, self.chunk_tokens)
        in_chunk = self._size_of_chunk(chunk) - used
        after = self.tokens_per_epoch - offset - in_chunk
        whole, rest = divmod(after, self.chunk_tokens)
        return in_chunk // seq_len + whole * (self.chunk_tokens // seq_len) + rest // seq_len

    def window_positions(self, position: int, seq_len: int, numbers: np.ndarray) -> np.ndarray:
        """Return the positions [n] at which windows `numbers` [n], counted from `position` on, begin."""
        left, per_epoch = self.windows_left(position, seq_len), self.windows_per_epoch(seq_len)
        assert per_epoch > 0, "a source shorter than a window is refused before training"
        out = self._positions_in_epoch(position, seq_len, numbers)
        later = np.flatnonzero(numbers >= left)
        if len(later):
            epochs_on, in_epoch = np.divmod(numbers[later] - left, per_epoch)
            epoch_begins = (position // self.tokens_per_epoch + 1 + epochs_on) * self.tokens_per_epoch
            out[later] = epoch_begins + self._positions_in_epoch(0, seq_len, in_epoch)
        return out

    def _positions_in_epoch(self, position: int, seq_len: int, numbers: np.ndarray) -> np.ndarray:
        """Return what `window_positions` does, as if the epoch had no end."""
        chunk, used = divmod(position % self.tokens_per_epoch, self.chunk_tokens)
        in_chunk, per_chunk = (self._size_of_chunk(chunk) - used) // seq_len, self.chunk_tokens // seq_len
        next_chunk = position - used + self.chunk_tokens
        if self.chunk_tokens % seq_len == 0:
            after_chunk = next_chunk + (numbers - in_chunk) * seq_len
        else:
            chunks_on, in_later = np.divmod(numbers - in_chunk, per_chunk)
            after_chunk = next_chunk + chunks_on * self.chunk_tokens + in_later * seq_len
        return np.where(numbers < in_chunk, position + numbers * seq_len, after_chunk)

    def position_after(self, position: int, seq_len: int, windows: int) -> int:
        """Return the position at which the first `windows` windows from `position` on end."""
        if windows == 0:
            return position
        return int(self.window_positions(position, seq_len, np.array([windows - 1]))[0]) + seq_len

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Return where the tokens at `positions` [n] lie in the source, counted from its first token, [n] int64."""
        first, last = int(positions.min()) // self.tokens_per_epoch, int(positions.max()) // self.tokens_per_epoch
        if first == last:
            return self._places_in_epoch(first, positions - first * self.tokens_per_epoch)
        epochs, offsets = np.divmod(positions, self.tokens_per_epoch)
        out = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(epochs).tolist():
            of_epoch = epochs == number
            out[of_epoch] = self._places_in_epoch(number, offsets[of_epoch])
        return out

    def _places_in_epoch(self, number: int, offsets: np.ndarray) -> np.ndarray:
        """Return what `places` does, for offsets [n] in one epoch."""
        epoch = self._epoch(number)
        chunks, in_chunk = np.divmod(offsets, self.chunk_tokens)
        first, last = int(chunks.min()), int(chunks.max())
        if last - first < len(chunks):
            # Many windows of few chunks: each chunk is looked up once.
            chunks = self._places_of_chunks(epoch, np.arange(first, last + 1))[chunks - first]
        else:
            chunks = self._places_of_chunks(epoch, chunks)
        places = chunks * self.chunk_tokens + in_chunk
        places += epoch.first_token
        places -= self.tokens_per_epoch * (places >= self.tokens_per_epoch)
        return places

    def _places_of_chunks(self, epoch: _Epoch, chunks: np.ndarray) -> np.ndarray:
        """Return which chunks [n] of the source come at places `chunks` [n] of an epoch."""
        whole = chunks < self.whole_chunks
        if whole.all():
            return epoch.order(chunks)
        out = chunks.copy()
        out[whole] = epoch.order(chunks[whole])
        return out

    def read(self, places: np.ndarray, count: int) -> np.ndarray:
        """Return `count` neighbouring tokens from each of `places` [n] on, [n, count] in the type of the files.

        After the source's last token comes its first.
        """
        out = np.empty((len(places), count), dtype=self.shards[0].tokens.dtype)
        shard_of = np.searchsorted(self.first_token_of_shard, places, side="right") - 1
        firsts = places - self.first_token_of_shard[shard_of]
        for shard in np.unique(shard_of).tolist():
            tokens, rows = self.shards[shard].tokens, np.flatnonzero(shard_of == shard)
            inside = firsts[rows] + count <= len(tokens)
            if inside.any():
                out[rows[inside]] = _gather(tokens, firsts[rows[inside]], count)
            for row in rows[~inside].tolist():
                out[row] = np.concatenate(
                    [self.shards[s].tokens[a:b] for s, a, b in self._runs(int(places[row]), count)]
                )
        return out

    def will_need(self, position: int, end: int) -> None:
        """Have the operating system begin to read the tokens at positions `position` .. `end` - 1."""
        chunk_begins = np.arange(
            position - position % self.tokens_per_epoch % self.chunk_tokens, end, self.chunk_tokens
        )
        for place in self.places(np.maximum(chunk_begins, position)).tolist():
            for shard, first, stop in self._runs(place, self.chunk_tokens):
                self.shards[shard].will_need(first, stop)

    def documents(self, place: int, count: int) -> list[DocumentPiece]:
        """Return the documents that `read([place], count)` is made of, in order, each with the part of it that is read."""
        pieces = []
        for shard, first, stop in self._runs(place, count):
            offsets = self.shards[shard].document_offsets
            document = int(np.searchsorted(offsets, first, side="right")) - 1
            while first < stop:
                end = min(stop, int(offsets[document + 1]))
                pieces.append(DocumentPiece(shard, document, first - int(offsets[document]), end - first))
                first, document = end, document + 1
        return [piece for piece in pieces if piece.tokens]

    def _runs(self, place: int, count: int) -> list[tuple[int, int, int]]:
        """Return (shard, first token, end) of the neighbouring tokens from a place on."""
        runs = []
        while count > 0:
            shard = int(np.searchsorted(self.first_token_of_shard, place, side="right")) - 1
            first = place - int(self.first_token_of_shard[shard])
            stop = min(first + count, len(self.shards[shard].tokens))
            runs.append((shard, first, stop))
            count -= stop - first
            place = (place + stop - first) % self.tokens_per_epoch
        return runs

    def _size_of_chunk(self, chunk: int) -> int:
        return self.chunk_tokens if chunk < self.whole_chunks else self.rest_tokens

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            if len(self._epochs) > 3:
                self._epochs.clear()
            start = KeyedPermutation(self.tokens_per_epoch, *self.key, "first token", number)
            self._epochs[number] = _Epoch(
                int(start(np.zeros(1, np.int64))[0]),
                KeyedPermutation(self.whole_chunks, *self.key, "chunks", number),
            )
        return self._epochs[number]


def _gather(tokens: np.ndarray, firsts: np.ndarray, count: int) -> np.ndarray:
    """Return `count` tokens from each of `firsts` [n] on, [n, count].

    Each window is copied as one element of `count` tokens, which is several times faster than token by token.
    """
    window = np.dtype((np.void, count * tokens.itemsize))
    windows = np.ndarray(len(tokens) - count + 1, dtype=window, buffer=tokens, strides=(tokens.itemsize,))
    return windows[firsts].view(tokens.dtype).reshape(len(firsts), count)
