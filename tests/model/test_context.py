"""Windows shared by ranks: who has which tokens, and the whole loss put together again (processes on gloo)."""

import numpy as np
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from yxanul_nemo.model.context import WindowSlices
from yxanul_nemo.validation.stage import whole_window_loss


def slices_and_losses() -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[int]]:
    dist.init_process_group("gloo")
    slices, tokens_seen = WindowSlices(dist.group.WORLD), []
    windows = torch.arange(48).view(2, 2, 12)
    mine = slices.take(windows)

    def loss(ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        tokens_seen.append(ids_BT.size(1))
        return ids_BT + 1000.0 * labels_BT

    losses = [
        whole_window_loss(loss, dist.group.WORLD, *torch.arange(4 * length).view(2, 2, length)).numpy()
        for length in (16, 700, 1536)
    ]
    return mine.numpy(), slices.join(mine).numpy(), losses, tokens_seen


def test_a_rank_has_a_chunk_from_each_end_and_losses_come_back_in_order() -> None:
    of_ranks = run_ranks(slices_and_losses, 3)
    windows = np.arange(48).reshape(2, 2, 12)
    for rank, (mine, joined, losses, tokens_seen) in enumerate(of_ranks):
        first, last = 2 * rank, 12 - 2 * rank
        np.testing.assert_array_equal(mine, windows[..., [first, first + 1, last - 2, last - 1]])
        np.testing.assert_array_equal(joined, windows)
        # Two chunks of 128 tokens or a multiple of that.
        assert tokens_seen == [256, 256, 512]
        for length, loss in zip((16, 700, 1536), losses, strict=True):
            ids, labels = np.arange(4 * length).reshape(2, 2, length)
            np.testing.assert_array_equal(loss, ids + 1000.0 * labels)
