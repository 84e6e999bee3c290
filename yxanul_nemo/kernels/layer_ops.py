"""What a transformer layer does between its matrix products, in as few passes over memory as there can be.

At the size of these models a layer's products take a quarter of a training step, and as much again goes into additions, norms, activations
and FP8 copies that each read what the one before has just written. Here a residual addition is one pass with the norm after it and its
rounding to FP8 in both orders, and so are the gradients of SwiGLU and of RoPE with theirs; SwiGLU's result is not kept for backward but
computed again where its inputs are read anyway. The arithmetic is Transformer Engine's: FP32 inside, numbers multiplied by delayed scales
and rounded once.
"""

from typing import NamedTuple, overload

import torch
import triton
from torch import Tensor

from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.layer_kernels import (
    add_norm_kernel,
    join_rope_kernel,
    quantize_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
)

WIDEST_NORM = 4096
"""A row of the residual stream is in one tile."""


class Slot(NamedTuple):
    """How one matrix is scaled and rounded to FP8."""

    dtype: torch.dtype
    """float8_e4m3fn or float8_e5m2."""
    scale: Tensor
    """What it is multiplied by [1] FP32."""
    scale_inv: Tensor
    """1 / scale."""
    amax: Tensor
    """Takes its largest absolute value [1] FP32, from which a later scale is made."""


class Matrix(NamedTuple):
    """An operand of products, in one or both orders."""

    rows: Tensor | None
    """[tokens, width]."""
    columns: Tensor | None
    """The same transposed [width, tokens], contiguous."""
    scale_inv: Tensor
    """What its numbers are multiplied by in products [1] FP32."""


def quantize(x_TC: Tensor, slot: Slot) -> Matrix:
    """x [tokens, width] in FP8, in both orders."""
    rows, columns = _both_orders(x_TC.size(0), x_TC.size(1), slot, x_TC.device)
    block_rows, block_columns = 64, 128
    grid = (triton.cdiv(x_TC.size(0), block_rows), triton.cdiv(x_TC.size(1), block_columns))
    quantize_kernel[grid](
        x_TC.contiguous(), rows, columns, slot.scale, slot.amax, *x_TC.shape, BLOCK_R=block_rows, BLOCK_C=block_columns
    )
    return Matrix(rows, columns, slot.scale_inv)


@overload
def add_norm(
    y_TC: Tensor | None, residual_TC: Tensor, weight_C: Tensor, eps: float, slot: Slot
) -> tuple[Tensor, Matrix, Tensor]: ...


@overload
def add_norm(
    y_TC: Tensor | None, residual_TC: Tensor, weight_C: Tensor, eps: float, slot: None
) -> tuple[Tensor, Tensor, Tensor]: ...


def add_norm(
    y_TC: Tensor | None, residual_TC: Tensor, weight_C: Tensor, eps: float, slot: Slot | None
) -> tuple[Tensor, Matrix | Tensor, Tensor]:
    """The residual stream after a layer's half, and its RMSNorm (arXiv:1910.07467) for the next.

    Returns:
        y + residual [tokens, width] (with y None, residual itself); its norm, in FP8 in both orders or, without a slot, in its own
        dtype; and the reciprocal root mean square of each row [tokens] FP32.
    """
    tokens, width = residual_TC.shape
    total_TC = residual_TC if y_TC is None else torch.empty_like(residual_TC)
    rstd_T = residual_TC.new_empty(tokens, dtype=torch.float32)
    if slot is None:
        rows, columns = torch.empty_like(residual_TC), None
    else:
        rows, columns = _both_orders(tokens, width, slot, residual_TC.device)
    block_columns = triton.next_power_of_2(width)
    assert block_columns <= WIDEST_NORM, f"rows of {width} numbers do not fit into a tile"
    # A transposed row is written 32 bytes at a time where that is possible, as memory is.
    block_rows = 32768 // max(1024, block_columns)
    add_norm_kernel[(triton.cdiv(tokens, block_rows),)](
        y_TC, residual_TC, weight_C, total_TC, rstd_T, rows, columns, slot and slot.scale, slot and slot.amax, tokens, eps,
        WIDTH=width, BLOCK_R=block_rows, BLOCK_C=block_columns, num_warps=16,
    )  # fmt: skip
    return total_TC, rows if slot is None else Matrix(rows, columns, slot.scale_inv), rstd_T


def swiglu(gate_up_TF: Tensor, slot: Slot) -> Matrix:
    """silu(gate) x up (arXiv:2002.05202) of gate_up [tokens, 2 x width], in FP8, its rows only."""
    tokens, width = gate_up_TF.size(0), gate_up_TF.size(1) // 2
    rows = gate_up_TF.new_empty(tokens, width, dtype=slot.dtype)
    block_rows, block_columns = 4, 512
    swiglu_kernel[(triton.cdiv(tokens, block_rows), triton.cdiv(width, block_columns))](
        gate_up_TF, rows, slot.scale, slot.amax, tokens, width, BLOCK_R=block_rows, BLOCK_C=block_columns, num_warps=8
    )
    return Matrix(rows, None, slot.scale_inv)


def swiglu_backward(dout_TC: Tensor, gate_up_TF: Tensor, slot: Slot, out_slot: Slot) -> tuple[Matrix, Matrix]:
    """Backward of `swiglu`.

    Returns:
        The gradient of gate_up in FP8, in both orders; and the columns of what `swiglu` gave, made again with `out_slot`'s scale, which
        must still be that of the forward pass.
    """
    tokens, width = dout_TC.shape
    rows, columns = _both_orders(tokens, 2 * width, slot, dout_TC.device)
    out_columns = dout_TC.new_empty(width, tokens, dtype=out_slot.dtype)
    block_rows, block_columns = 32, 128
    swiglu_backward_kernel[(triton.cdiv(tokens, block_rows), triton.cdiv(width, block_columns))](
        dout_TC, gate_up_TF, rows, columns, slot.scale, slot.amax, out_columns, out_slot.scale, tokens, width,
        BLOCK_R=block_rows, BLOCK_C=block_columns,
    )  # fmt: skip
    return Matrix(rows, columns, slot.scale_inv), Matrix(None, out_columns, out_slot.scale_inv)


def join_rope(
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    turn: tuple[Tensor, Tensor],
    heads: Heads,
    batch_size: int,
    slot: Slot,
) -> Matrix:
    """Backward of `kernels.split_rope`, into FP8 in both orders: the gradient of the mixed projection [tokens x windows, qkv_width].

    Args:
        dquery, dkey, dvalue: [tokens, windows, heads of its kind, head_dim].
        turn: cosines and sines of RoPE's angles, each [positions, head_dim / 2] FP32; positions begin anew where they are at their end.
        batch_size: windows, whose tokens of one position are neighbours.
    """
    n_rows = dquery.numel() // heads.out_width
    rows, columns = _both_orders(n_rows, heads.qkv_width, slot, dquery.device)
    block_rows = 32
    join_rope_kernel[(triton.cdiv(n_rows, block_rows), heads.groups)](
        dquery.contiguous(), dkey.contiguous(), dvalue.contiguous(), *turn, rows, columns, slot.scale, slot.amax,
        n_rows, batch_size, turn[0].size(0), heads.groups, heads.heads_per_group, HALF=heads.head_dim // 2, BLOCK_R=block_rows,
    )  # fmt: skip
    return Matrix(rows, columns, slot.scale_inv)


def _both_orders(tokens: int, width: int, slot: Slot, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(tokens, width, dtype=slot.dtype, device=device),
        torch.empty(width, tokens, dtype=slot.dtype, device=device),
    )
