"""Windows that context-parallel ranks share: which tokens each of them has."""

import torch
import torch.distributed as dist
from torch import Tensor


class WindowSlices:
    """A window is cut into two chunks per rank; rank r of n has chunks r and 2n - 1 - r, so that under a causal mask all have equal work.

    Megatron-core and Transformer Engine take this layout for granted (`get_pos_emb_on_this_cp_rank`).
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def take(self, x: Tensor) -> Tensor:
        """This rank's tokens [..., T / ranks] of windows [..., T]; T is a multiple of 2 ranks."""
        ranks, rank = self.group.size(), self.group.rank()
        if ranks == 1:
            return x
        chunks = x.chunk(2 * ranks, dim=-1)
        assert len(chunks) == 2 * ranks and chunks[0].size(-1) == chunks[-1].size(-1), "refused by the configuration"
        return torch.cat((chunks[rank], chunks[-1 - rank]), dim=-1)

    def join(self, x: Tensor) -> Tensor:
        """Windows [..., T] from each rank's tokens [..., T / ranks], on every rank, without gradients."""
        if self.group.size() == 1:
            return x
        slices = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(slices, x.detach().contiguous(), group=self.group)
        firsts, seconds = zip(*(each.chunk(2, dim=-1) for each in slices), strict=True)
        return torch.cat((*firsts, *reversed(seconds)), dim=-1)
