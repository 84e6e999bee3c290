"""Nats per document under a model: every token once, padding never, long documents by overlapping windows, sums in FP64."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
PAD_MULTIPLE = 16
"""The tokens of a batch are a multiple of this, as FP8 matrix products need."""
SHORTEST_SHAPE = 8
"""Fewest columns where batches have few shapes."""

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
class Windows:
    """Parts of documents, W of them: inputs `[start, start + length)` of the sequence EOS + ids; the last `scored` labels count."""

    document_W: np.ndarray
    start_W: np.ndarray
    length_W: np.ndarray
    scored_W: np.ndarray


def windows_of(n_tokens_D: np.ndarray, eval_len: int, stride: int) -> Windows:
    """Windows of at most `eval_len` inputs that score each of a document's labels exactly once, each with the longest context
    that windows at multiples of `stride` give it; D documents, in their order."""
    count_D = np.where(n_tokens_D > 0, 1 + -(-np.maximum(n_tokens_D - eval_len, 0) // stride), 0)
    document_W = np.repeat(np.arange(len(n_tokens_D)), count_D)
    first_D = np.cumsum(count_D) - count_D
    start_W = (np.arange(len(document_W)) - first_D[document_W]) * stride
    stop_W = np.minimum(start_W + eval_len, n_tokens_D[document_W])
    covered_W = np.where(start_W == 0, 0, start_W - stride + eval_len)
    return Windows(document_W, start_W, stop_W - start_W, stop_W - covered_W)


def batches_of(length_W: np.ndarray, batch_tokens: int, few_shapes: bool) -> Iterator[tuple[np.ndarray, int, int]]:
    """Windows of like length together, longest first: (numbers of the windows, rows, columns) of each batch.

    Args:
        batch_tokens: at most so many rows x columns in a batch of more than one window.
        few_shapes: columns in powers of two and always the same number of rows for them, the last ones empty: kernels of a GPU are
            compiled, or looked for, once for each shape, which takes longer than the padding. Otherwise a batch has no empty rows.
    """
    order = np.argsort(-length_W, kind="stable")
    longest = -(-int(length_W.max(initial=0)) // PAD_MULTIPLE) * PAD_MULTIPLE
    first = 0
    while first < len(order):
        length = int(length_W[order[first]])
        columns = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
        if few_shapes:
            columns = min(max(SHORTEST_SHAPE, 1 << (length - 1).bit_length()), longest)
        # At least a multiple of PAD_MULTIPLE tokens, also with the fewest columns.
        rows = max(1, PAD_MULTIPLE // columns, batch_tokens // columns // 2 * 2)
        chosen = order[first : first + rows]
        yield chosen, rows if few_shapes else len(chosen), columns
        first += len(chosen)


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
    and padding are -100. The host does not wait for the device before the last batch.
    """
    windows = windows_of(np.array([len(document.ids) for document in documents], dtype=np.int64), eval_len, stride)
    layout = _Sequences(documents, eos_id)
    order: list[np.ndarray] = []
    nats: list[Tensor] = []
    for chosen, rows, columns in batches_of(windows.length_W, batch_tokens, few_shapes=device != "cpu"):
        ids_BT, labels_BT = (_on(x, device) for x in layout.batch(windows, chosen, rows, columns))
        with torch.no_grad():
            loss_BT = loss_function(ids_BT, labels_BT)
            per_window = torch.where(labels_BT != IGNORE_INDEX, loss_BT.double(), 0.0).sum(dim=1)
        order.append(windows.document_W[chosen])
        nats.append(per_window[: len(chosen)])
    if not order:
        return np.zeros(len(documents))
    return np.bincount(np.concatenate(order), weights=torch.cat(nats).cpu().numpy(), minlength=len(documents))


def _on(values: np.ndarray, device: str) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class _Sequences:
    """All documents as one array, EOS before each."""

    def __init__(self, documents: Sequence[Document], eos_id: int):
        self.eos_id = eos_id
        lengths = np.array([1 + len(document.ids) for document in documents], dtype=np.int64)
        self.begin_D = np.cumsum(lengths) - lengths
        self.ids = np.full(int(lengths.sum()), eos_id, dtype=np.int64)
        for begin, document in zip(self.begin_D, documents, strict=True):
            self.ids[begin + 1 : begin + 1 + len(document.ids)] = document.ids

    def batch(self, windows: Windows, chosen: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels [rows, columns] of the chosen windows; further rows and columns are padding."""
        ids_BT = np.full((rows, columns), self.eos_id, dtype=np.int64)
        labels_BT = np.full((rows, columns), IGNORE_INDEX, dtype=np.int64)
        column_T = np.arange(columns)
        length_W, scored_W = windows.length_W[chosen, None], windows.scored_W[chosen, None]
        place_WT = (self.begin_D[windows.document_W[chosen]] + windows.start_W[chosen])[:, None] + column_T
        is_input_WT = column_T < length_W
        is_scored_WT = is_input_WT & (column_T >= length_W - scored_W)
        ids_BT[: len(chosen)][is_input_WT] = self.ids[place_WT[is_input_WT]]
        labels_BT[: len(chosen)][is_scored_WT] = self.ids[place_WT[is_scored_WT] + 1]
        return ids_BT, labels_BT


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
