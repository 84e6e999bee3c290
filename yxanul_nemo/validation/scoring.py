"""Nats per document under a model: every token once, padding never, long documents by overlapping windows, sums in FP64."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
PAD_MULTIPLE = 16
"""Batches are padded to a multiple of this length, as FP8 matrix products need."""

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(ids_BT, labels_BT) -> loss_BT: the loss of each label given all ids up to its place; anything where the label is -100."""


@dataclass(frozen=True)
class Document:
    """A held-out text: its token ids without EOS, and its size in bytes of UTF-8."""

    ids: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class DomainScore:
    """A domain's result. The first token of a document is predicted from EOS; EOS itself is not scored."""

    documents: int
    tokens: int
    text_bytes: int
    nats: float
    loss_nats_per_token: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_standard_error: float
    """Over documents, as that of a ratio of sums; 0 for a single document."""


@dataclass(frozen=True)
class Window:
    """Part of a document: inputs `[start, start + length)` of the sequence EOS + ids, of which the last `scored` labels count."""

    document: int
    start: int
    length: int
    scored: int


def windows_of(document: int, n_tokens: int, eval_len: int, stride: int) -> Iterator[Window]:
    """Windows of at most `eval_len` inputs that score each of `n_tokens` labels exactly once, each with the longest context
    that windows at multiples of `stride` give it."""
    start = covered = 0
    while covered < n_tokens:
        end = min(start + eval_len, n_tokens)
        yield Window(document, start, end - start, end - covered)
        covered = end
        start += stride


def score_documents(
    loss_function: LossFunction,
    documents: Sequence[Document],
    *,
    eos_id: int,
    eval_len: int,
    stride: int,
    batch_tokens: int,
    device: str = "cpu",
) -> np.ndarray:
    """Nats [documents] float64 of each document.

    Windows of like length are scored together, at most `batch_tokens` inputs at once; labels outside a window's scored part
    and padding are -100.
    """
    windows = [
        window
        for number, document in enumerate(documents)
        for window in windows_of(number, len(document.ids), eval_len, stride)
    ]
    windows.sort(key=lambda window: window.length)
    nats = torch.zeros(len(documents), dtype=torch.float64)
    first = 0
    while first < len(windows):
        last = first + 1
        while last < len(windows) and windows[last].length * (last + 1 - first) <= batch_tokens:
            last += 1
        batch = windows[first:last]
        ids_BT, labels_BT = _padded(batch, documents, eos_id)
        with torch.no_grad():
            loss_BT = loss_function(ids_BT.to(device), labels_BT.to(device))
        scored_BT = labels_BT != IGNORE_INDEX
        per_window = torch.where(scored_BT, loss_BT.double().cpu(), 0.0).sum(dim=1)
        nats.index_add_(0, torch.tensor([window.document for window in batch]), per_window)
        first = last
    return nats.numpy()


def _padded(batch: Sequence[Window], documents: Sequence[Document], eos_id: int) -> tuple[Tensor, Tensor]:
    length = -(-max(window.length for window in batch) // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = np.full((len(batch), length), eos_id, dtype=np.int64)
    labels = np.full((len(batch), length), IGNORE_INDEX, dtype=np.int64)
    for row, window in enumerate(batch):
        tokens = documents[window.document].ids
        stop = window.start + window.length
        # Input i of the sequence EOS + ids is ids[i - 1]; its label is ids[i].
        if window.start == 0:
            ids[row, 1 : window.length] = tokens[: stop - 1]
        else:
            ids[row, : window.length] = tokens[window.start - 1 : stop - 1]
        labels[row, window.length - window.scored : window.length] = tokens[stop - window.scored : stop]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def domain_score(documents: Sequence[Document], nats: np.ndarray) -> DomainScore:
    """Sums over a domain's documents; needs at least one token."""
    tokens = sum(len(document.ids) for document in documents)
    sizes = np.array([document.text_bytes for document in documents], dtype=np.float64)
    total = float(nats.sum())
    bits_per_byte = total / math.log(2) / sizes.sum()
    residuals = nats / math.log(2) - bits_per_byte * sizes
    n = len(documents)
    error = math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) / sizes.sum() if n > 1 else 0.0
    return DomainScore(
        documents=n,
        tokens=tokens,
        text_bytes=int(sizes.sum()),
        nats=total,
        loss_nats_per_token=total / tokens,
        perplexity=math.exp(min(total / tokens, 700.0)),
        bits_per_byte=bits_per_byte,
        bits_per_byte_standard_error=error,
    )
