"""Causal grouped-query attention in windows of several tiles, forward and backward.

cuDNN's backward pass (9.14) sums the gradients of queries in FP32 in memory, rounds them afterwards, and adds those of keys and values up
over the heads that share them in further passes: a cost per token that does not fall with the window, more than half of what the pass
itself takes at 512 tokens. Here one kernel has the gradients of queries and one those of keys and values, which goes through all the heads
that share them in one loop. Both compute the scores again, seven products in all where cuDNN needs five, and write each gradient once.
Every sum has a fixed order, so results repeat to the last bit. After FlashAttention-2 (arXiv:2307.08691) but for the forward pass's running
maximum, which it does without (`raised_sums`).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from yxanul_nemo.kernels.attention_limits import BLOCK
from yxanul_nemo.kernels.causal_attention_kernels import (
    key_value_gradients_kernel,
    query_gradient_kernel,
    tiled_forward_kernel,
)

FORWARD_REGISTERS = 96
"""Of a thread, so that five programs fit on a multiprocessor with two stages, which saves 9 to 22% of the kernel's time (LOG.md)."""
KEY_VALUE_REGISTERS = 168
"""Of a thread, so that three programs fit on a multiprocessor, which saves 8% of the kernel's time (LOG.md)."""
ENOUGH_PROGRAMS = 384
"""Programs of `key_value_gradients_kernel` that keep an H100 busy, about three on each multiprocessor. Where whole groups of heads make
fewer, each has a part of a group."""
SHORTEST_PARTED = 1024
"""Programs of shorter windows end soon, and adding parts up costs more than they save (LOG.md)."""


def parts_of_heads(seq_len: int, programs: int, per_group: int) -> int:
    """Into how many equal parts the heads of a group go, so that there are enough programs if a whole group makes so many."""
    if seq_len < SHORTEST_PARTED:
        return 1
    divisors = (parts for parts in range(1, per_group + 1) if per_group % parts == 0)
    return next((parts for parts in divisors if programs * parts >= ENOUGH_PROGRAMS), per_group)


def causal_attention(q_TBHD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
    """Attention of each window's tokens to themselves and what is before them; scores are scaled by 1 / sqrt(head_dim).

    Args:
        q_TBHD: [tokens, windows, query heads, head_dim] BF16; as `attention_limits.why_not_tiled` has it, and FP32 in Triton's interpreter.
        k_TBGD, v_TBGD: [tokens, windows, groups, head_dim]; query head h sees those of group h // (query heads / groups).
        starts_BT: the first token of its window that each token sees [windows, tokens] int32, at most its own place and never less than
            that of the token before (`model.documents.document_starts`); None: 0 for all.

    Returns:
        [tokens, windows, query heads x head_dim] in the dtype of the input.
    """
    seq_len, _, heads, head_dim = q_TBHD.shape
    assert seq_len % BLOCK == 0 and heads % k_TBGD.size(2) == 0
    assert k_TBGD.shape == v_TBGD.shape == (*q_TBHD.shape[:2], k_TBGD.size(2), head_dim)
    assert starts_BT is None or starts_BT.shape == (q_TBHD.size(1), seq_len)
    return _CausalAttention.apply(q_TBHD, k_TBGD, v_TBGD, starts_BT)


class _Launch(NamedTuple):
    """How the kernels are started."""

    seq_len: int
    windows: int
    heads: int
    groups: int
    head_dim: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def exponent(self) -> float:
        """Of 2, so that its power is e to the scaled score."""
        return self.scale * math.log2(math.e)

    @property
    def parts(self) -> int:
        """That the heads of a group are parted into for the gradients of keys and values."""
        return parts_of_heads(self.seq_len, *self.grid(self.groups), self.heads // self.groups)

    def grid(self, heads: int) -> tuple[int]:
        """A program for each tile of each of so many heads."""
        return (self.seq_len // BLOCK * self.windows * heads,)

    @property
    def constants(self) -> dict[str, int]:
        return {
            "heads": self.heads,
            "per_group": self.heads // self.groups,
            "WIDTH": self.head_dim,
            "BLOCK": BLOCK,
            "num_warps": 4,
        }


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TBHD: Tensor,
        k_TBGD: Tensor,
        v_TBGD: Tensor,
        starts_BT: Tensor | None,
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q_TBHD, k_TBGD, v_TBGD))
        starts = None if starts_BT is None else starts_BT.contiguous()
        launch = _Launch(q.size(0), q.size(1), q.size(2), k.size(2), q.size(3))
        out = torch.empty_like(q)
        lse = q.new_empty(launch.windows * launch.heads, launch.seq_len, dtype=torch.float32)
        tiled_forward_kernel[launch.grid(launch.heads)](
            *map(_tiles, (q, k, v, out)), starts, lse, launch.seq_len, launch.exponent, **launch.constants,
            num_stages=2, maxnreg=FORWARD_REGISTERS,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.launch = launch
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TBO: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse, starts = ctx.saved_tensors
        launch: _Launch = ctx.launch
        dout = dout_TBO.contiguous().view_as(q)
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        dk, dv = (_room_for_parts(x, launch.parts) for x in (k, v))
        sizes = (launch.seq_len, launch.exponent, launch.scale)
        query_gradient_kernel[launch.grid(launch.heads)](
            *map(_tiles, (q, k, v, out, dout, dq)), starts, lse, delta, *sizes, **launch.constants, num_stages=2
        )
        last_tile = None if starts is None else _last_tile(starts)
        key_value_gradients_kernel[launch.grid(launch.groups * launch.parts)](
            *map(_tiles, (q, k, v, dout, dk, dv)), starts, last_tile, lse, delta, *sizes, launch.parts, **launch.constants,
            num_stages=3, maxnreg=KEY_VALUE_REGISTERS,
        )  # fmt: skip
        return dq, _sum_of_parts(dk, k), _sum_of_parts(dv, v), None


def _room_for_parts(x_TBGD: Tensor, parts: int) -> Tensor:
    """For the gradient of x, or for those of its parts [T, B, G x parts, D] in FP32."""
    seq_len, windows, groups, head_dim = x_TBGD.shape
    if parts == 1:
        return torch.empty_like(x_TBGD)
    return x_TBGD.new_empty(seq_len, windows, groups * parts, head_dim, dtype=torch.float32)


def _sum_of_parts(dx_TBPD: Tensor, x_TBGD: Tensor) -> Tensor:
    if dx_TBPD.shape == x_TBGD.shape:
        return dx_TBPD
    return dx_TBPD.unflatten(2, (x_TBGD.size(2), -1)).sum(dim=3).to(x_TBGD.dtype)


def _last_tile(starts_BT: Tensor) -> Tensor:
    """The last tile of queries that see one of the keys of each tile [B, tiles] int32."""
    last_key = torch.arange(BLOCK - 1, starts_BT.size(1), BLOCK, dtype=torch.int32, device=starts_BT.device)
    queries = torch.searchsorted(starts_BT, last_key.expand(starts_BT.size(0), -1).contiguous(), right=True)
    return ((queries - 1) // BLOCK).int()


def _tiles(x_TBHD: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x_TBHD.flatten(1), [BLOCK, x_TBHD.size(3)])
