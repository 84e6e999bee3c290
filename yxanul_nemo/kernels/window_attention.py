"""Causal attention inside short windows, from the mixed projection to the heads' outputs in one kernel each way.

A window of up to `LONGEST_SHORT_WINDOW` tokens fits one tile, several short ones share it, and a block-diagonal mask keeps them apart, and
documents inside them where that is asked for. So there is no pass over keys to keep a running maximum for, RoPE is applied on the
way in (and undone on the way out of backward), queries, keys and values are never split into tensors of their own, and backward
needs nothing but the inputs. General attention libraries spend their time on launches and layout at these lengths: a tile of theirs
is longer than the window.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from yxanul_nemo.kernels.attention_limits import dtype_name, why_not_short
from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.window_attention_kernels import window_backward_kernel, window_forward_kernel


def window_attention(qkv_TBQ: Tensor, angles_TD: Tensor, heads: Heads, starts_BT: Tensor | None = None) -> Tensor:
    """Attention of each window to itself and what is before it, with RoPE; scores are scaled by 1 / sqrt(head_dim).

    Args:
        qkv_TBQ: [tokens, windows, qkv_width] BF16 or FP16; per key/value head its query heads, its key, its value (Megatron-core's order).
        angles_TD: RoPE angles [tokens, head_dim] FP32, each frequency twice (rotate-half).
        starts_BT: the first token of its window that each token sees [windows, tokens] int32, at most its own place; None: 0 for all.

    Returns:
        [tokens, windows, heads x head_dim] in the dtype of the input.
    """
    reason = why_not_short(dtype_name(qkv_TBQ.dtype), qkv_TBQ.size(0), heads.head_dim)
    assert reason is None, reason
    assert qkv_TBQ.size(2) == heads.qkv_width and qkv_TBQ.size(0) == angles_TD.size(0)
    assert starts_BT is None or starts_BT.shape == (qkv_TBQ.size(1), qkv_TBQ.size(0))
    return _WindowAttention.apply(qkv_TBQ, angles_TD, heads, starts_BT)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_TBQ: Tensor,
        angles_TD: Tensor,
        heads: Heads,
        starts_BT: Tensor | None,
    ) -> Tensor:
        qkv_TBQ, angles_TD = qkv_TBQ.contiguous(), angles_TD.contiguous()
        starts_BT = None if starts_BT is None else starts_BT.contiguous()
        out_TBO = qkv_TBQ.new_empty(*qkv_TBQ.shape[:2], heads.out_width)
        _launch(window_forward_kernel, heads, qkv_TBQ, angles_TD, starts_BT, out_TBO)
        ctx.save_for_backward(qkv_TBQ, angles_TD, starts_BT)
        ctx.heads = heads
        return out_TBO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TBO: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_TBQ, angles_TD, starts_BT = ctx.saved_tensors
        dqkv_TBQ = torch.empty_like(qkv_TBQ)
        _launch(window_backward_kernel, ctx.heads, qkv_TBQ, angles_TD, starts_BT, dout_TBO.contiguous(), dqkv_TBQ)
        return dqkv_TBQ, None, None, None


def _launch(kernel: triton.JITFunction, heads: Heads, qkv_TBQ: Tensor, *others: Tensor | None) -> None:
    seq_len, batch_size = qkv_TBQ.shape[:2]
    # 64 rows are the smallest tile of Hopper's matrix unit; a longer window takes a tile of its own.
    block_rows = 64 if seq_len <= 64 else 128
    windows = block_rows // seq_len
    kernel[(triton.cdiv(batch_size, windows), heads.groups)](
        qkv_TBQ,
        *others,
        batch_size,
        seq_len,
        heads.groups,
        heads.heads_per_group,
        windows,
        heads.head_dim**-0.5,
        HALF=heads.head_dim // 2,
        BLOCK_M=block_rows,
        num_warps=4 if block_rows == 64 else 8,
    )
