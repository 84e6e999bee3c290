"""From the mixed projection to queries, keys and values with RoPE applied, in one pass over memory each way.

A memory-bound step: 2 bytes in and 2 bytes out per number. Transformer Engine's fused kernel for the same reaches a third of the bandwidth
of an H200 here (LOG.md), and the two of Megatron-core's default path (split, then rotate queries and keys apart) still less.
Rotation is RoPE (arXiv:2104.09864) in the rotate-half form.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from yxanul_nemo.kernels.heads import Heads

BLOCK_ROWS = 4


@triton.jit
def _places(
    first_row,
    rows,
    groups: tl.constexpr,
    per_group: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a tile [rows, heads in the mixed projection, half a head]: its offsets there, and in q, k and v, with which head is which."""
    width: tl.constexpr = 2 * HALF
    row_R = (first_row + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None, None]
    head_N = tl.arange(0, BLOCK_N)[None, :, None]
    i_H = tl.arange(0, HALF)[None, None, :]
    real = (row_R < rows) & (head_N < groups * (per_group + 2))
    group_N, place_N = head_N // (per_group + 2), head_N % (per_group + 2)
    mixed = (row_R * (groups * (per_group + 2)) + head_N) * width + i_H
    query = (row_R * (groups * per_group) + group_N * per_group + place_N) * width + i_H
    key_value = (row_R * groups + group_N) * width + i_H
    return mixed, query, key_value, real, place_N


@triton.jit
def _turn(
    angles,
    first_row,
    batch_size,
    positions,
    rows,
    place_N,
    per_group: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """cos and sin [rows, heads, half]; values are not turned. Positions begin anew where the angles are at their end."""
    row_R = first_row + tl.arange(0, BLOCK_R)
    at_RH = (row_R // batch_size % positions)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    angle_RH = tl.load(angles + at_RH, mask=(row_R < rows)[:, None], other=0.0)
    is_value_N = place_N == per_group + 1
    return tl.where(is_value_N, 1.0, tl.cos(angle_RH)[:, None, :]), tl.where(
        is_value_N, 0.0, tl.sin(angle_RH)[:, None, :]
    )


@triton.jit(do_not_specialize=["rows", "batch_size", "positions"])
def split_kernel(
    mixed, angles, query, key, value, rows, batch_size, positions,
    groups: tl.constexpr, per_group: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mixed [rows, groups x (per_group + 2) heads] -> rotated query, rotated key, value; a row is a token of a window."""
    first_row = tl.program_id(0) * BLOCK_R
    at, to_query, to_key_value, real, place_N = _places(first_row, rows, groups, per_group, HALF, BLOCK_R, BLOCK_N)
    cos, sin = _turn(angles, first_row, batch_size, positions, rows, place_N, per_group, HALF, BLOCK_R)
    a = tl.load(mixed + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(mixed + at + HALF, mask=real, other=0.0).to(tl.float32)
    dtype = mixed.dtype.element_ty
    a, b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    is_query, is_key, is_value = (
        real & (place_N < per_group),
        real & (place_N == per_group),
        real & (place_N > per_group),
    )
    tl.store(query + to_query, a, mask=is_query)
    tl.store(query + to_query + HALF, b, mask=is_query)
    tl.store(key + to_key_value, a, mask=is_key)
    tl.store(key + to_key_value + HALF, b, mask=is_key)
    tl.store(value + to_key_value, a, mask=is_value)
    tl.store(value + to_key_value + HALF, b, mask=is_value)


@triton.jit(do_not_specialize=["rows", "batch_size", "positions"])
def join_kernel(
    dquery, dkey, dvalue, angles, dmixed, rows, batch_size, positions,
    groups: tl.constexpr, per_group: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of `split_kernel`'s input from those of its outputs: the same with the rotation undone."""
    first_row = tl.program_id(0) * BLOCK_R
    at, to_query, to_key_value, real, place_N = _places(first_row, rows, groups, per_group, HALF, BLOCK_R, BLOCK_N)
    cos, sin = _turn(angles, first_row, batch_size, positions, rows, place_N, per_group, HALF, BLOCK_R)
    is_query, is_key, is_value = (
        real & (place_N < per_group),
        real & (place_N == per_group),
        real & (place_N > per_group),
    )
    # Each number is in one of the three; the other two loads are masked away and give 0.
    a = tl.load(dquery + to_query, mask=is_query, other=0.0).to(tl.float32)
    a += tl.load(dkey + to_key_value, mask=is_key, other=0.0)
    a += tl.load(dvalue + to_key_value, mask=is_value, other=0.0)
    b = tl.load(dquery + to_query + HALF, mask=is_query, other=0.0).to(tl.float32)
    b += tl.load(dkey + to_key_value + HALF, mask=is_key, other=0.0)
    b += tl.load(dvalue + to_key_value + HALF, mask=is_value, other=0.0)
    dtype = dmixed.dtype.element_ty
    tl.store(dmixed + at, (a * cos + b * sin).to(dtype), mask=real)
    tl.store(dmixed + at + HALF, (b * cos - a * sin).to(dtype), mask=real)


def split_rope(qkv_TBQ: Tensor, angles_TD: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the mixed projection, queries and keys turned by RoPE.

    Args:
        qkv_TBQ: [tokens, windows, qkv_width]; per key/value head its query heads, its key, its value (Megatron-core's order).
        angles_TD: RoPE angles [positions, head_dim] FP32, each frequency twice (rotate-half); head_dim is a power of two. Fewer positions
            than tokens: the tokens of a row are windows of that length, one after another.

    Returns:
        [tokens, windows, query heads, head_dim], and twice [tokens, windows, groups, head_dim], contiguous, in the input's dtype.
    """
    assert qkv_TBQ.size(2) == heads.qkv_width and qkv_TBQ.size(0) % angles_TD.size(0) == 0
    assert heads.head_dim == triton.next_power_of_2(heads.head_dim), "the angles' halves are one tile wide"
    return _SplitRope.apply(qkv_TBQ, angles_TD, heads)


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_TBQ: Tensor, angles_TD: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        qkv_TBQ, angles_TD = qkv_TBQ.contiguous(), angles_TD.contiguous()
        tokens, windows = qkv_TBQ.shape[:2]
        query = qkv_TBQ.new_empty(tokens, windows, heads.groups * heads.heads_per_group, heads.head_dim)
        key, value = (qkv_TBQ.new_empty(tokens, windows, heads.groups, heads.head_dim) for _ in range(2))
        shape = (tokens * windows, windows, angles_TD.size(0))
        _launch(split_kernel, heads, shape, qkv_TBQ, angles_TD, query, key, value)
        ctx.save_for_backward(angles_TD)
        ctx.heads = heads
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor, None, None]:
        (angles_TD,) = ctx.saved_tensors
        tokens, windows = dquery.shape[:2]
        dqkv_TBQ = dquery.new_empty(tokens, windows, ctx.heads.qkv_width)
        grads = (dquery.contiguous(), dkey.contiguous(), dvalue.contiguous())
        shape = (tokens * windows, windows, angles_TD.size(0))
        _launch(join_kernel, ctx.heads, shape, *grads, angles_TD, dqkv_TBQ)
        return dqkv_TBQ, None, None


def _launch(kernel: triton.JITFunction, heads: Heads, shape: tuple[int, int, int], *tensors: Tensor) -> None:
    """shape: (rows, batch_size, positions)."""
    kernel[(triton.cdiv(shape[0], BLOCK_ROWS),)](
        *tensors,
        *shape,
        heads.groups,
        heads.heads_per_group,
        HALF=heads.head_dim // 2,
        BLOCK_R=BLOCK_ROWS,
        BLOCK_N=triton.next_power_of_2(heads.groups * (heads.heads_per_group + 2)),
        num_warps=4,
    )
