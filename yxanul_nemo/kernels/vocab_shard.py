"""Rows of a vocabulary-parallel embedding table that one process holds, and sums over all of its rows."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """The rows of the embedding table that this process holds, in Megatron's vocabulary-parallel layout.

    Attributes:
        first_row: the vocabulary index of the process's row 0.
        valid_rows: how many of its rows, from row 0 on, belong to the vocabulary; the rest is padding.
        vocab_size: size of the whole vocabulary, without padding.
        group: the tensor-parallel group over which the vocabulary is split, or None.
    """

    first_row: int
    valid_rows: int
    vocab_size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """The shard of this process, which holds `rows` rows: those from rank * rows on."""
        if group is not None and group.size() == 1:
            group = None
        ranks = 1 if group is None else group.size()
        if not 0 < vocab_size <= rows * ranks:
            raise ValueError(f"vocab_size {vocab_size} is outside 1..{rows * ranks}, the rows of the embedding table")
        first_row = 0 if group is None else group.rank() * rows
        return cls(first_row, min(max(vocab_size - first_row, 0), rows), vocab_size, group)

    def counted(self, labels_T: Tensor, ignore_index: int) -> Tensor:
        """True where a label takes part in the loss: within the vocabulary and not `ignore_index`."""
        return (labels_T != ignore_index) & (labels_T >= 0) & (labels_T < self.vocab_size)

    def reduce(self, lse_T: Tensor, label_logit_T: Tensor) -> tuple[Tensor, Tensor]:
        """Whole-vocabulary log-sum-exp and label logit from those of each process (0 where the label is elsewhere)."""
        if self.group is None:
            return lse_T, label_logit_T
        highest_T = lse_T.clone()
        dist.all_reduce(highest_T, op=dist.ReduceOp.MAX, group=self.group)
        sums_2T = torch.stack([torch.exp(lse_T - highest_T), label_logit_T])
        dist.all_reduce(sums_2T, op=dist.ReduceOp.SUM, group=self.group)
        return highest_T + torch.log(sums_2T[0]), sums_2T[1]

    def loss(self, lse_T: Tensor, label_logit_T: Tensor, labels_T: Tensor, ignore_index: int) -> Tensor:
        """Loss per token from the reduced parts: 0 where ignored, NaN where the label is not in the vocabulary."""
        loss_T = torch.where(self.counted(labels_T, ignore_index), (lse_T - label_logit_T).clamp_min(0.0), float("nan"))
        return torch.where(labels_T == ignore_index, 0.0, loss_T)
