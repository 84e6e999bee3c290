"""Triton kernels of `muon_ops`, which says what they do. A program has some rows of one matrix and goes through their columns."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS = 4, 256


@triton.jit
def _rows(places, n_rows, BLOCK_R: tl.constexpr, HAS_PLACES: tl.constexpr):
    """This program's matrix, rows of the parameter, their places in its pieces, and which are real."""
    row_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < n_rows
    place_R = row_R
    if HAS_PLACES:
        place_R = tl.load(places + row_R, mask=real_R, other=0)
    return tl.program_id(0).to(tl.int64), row_R, place_R, real_R


@triton.jit
def mix_kernel(
    grads,
    momenta,
    out,
    squares,
    places,
    grad_scale,
    applied,
    grads_stride,
    n_rows,
    n_columns,
    momentum: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As `mix_momentum`."""
    if tl.load(applied):
        matrix, row_R, place_R, real_R = _rows(places, n_rows, BLOCK_R, HAS_PLACES)
        scale = tl.load(grad_scale)
        sum_R = tl.zeros((BLOCK_R,), tl.float32)
        for first in range(0, n_columns, BLOCK_C):
            column_C = first + tl.arange(0, BLOCK_C)
            real_RC = real_R[:, None] & (column_C < n_columns)[None, :]
            at_RC = row_R[:, None] * n_columns + column_C[None, :]
            grad_RC = tl.load(grads + matrix * grads_stride + at_RC, mask=real_RC, other=0.0) / scale
            here = momenta + matrix * n_rows * n_columns + at_RC
            mixed_RC = tl.load(here, mask=real_RC, other=0.0)
            mixed_RC += (1 - momentum) * (grad_RC - mixed_RC)
            tl.store(here, mixed_RC, mask=real_RC)
            if NESTEROV:
                mixed_RC = grad_RC + momentum * (mixed_RC - grad_RC)
            sum_R += tl.sum(mixed_RC * mixed_RC, axis=1)
            there = out + matrix * n_rows * n_columns + place_R[:, None] * n_columns + column_C[None, :]
            tl.store(there, mixed_RC.to(out.dtype.element_ty), mask=real_RC)
        tl.store(squares + matrix * n_rows + place_R, sum_R, mask=real_R)


@triton.jit
def apply_kernel(
    mains,
    values,
    updates,
    factors,
    places,
    lr,
    applied,
    stride,
    n_rows,
    n_columns,
    weight_decay: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As `apply_update`."""
    if tl.load(applied):
        matrix, row_R, place_R, real_R = _rows(places, n_rows, BLOCK_R, HAS_PLACES)
        rate = tl.load(lr)
        factor_R = tl.load(factors + matrix * n_rows + place_R, mask=real_R, other=0.0)
        for first in range(0, n_columns, BLOCK_C):
            column_C = first + tl.arange(0, BLOCK_C)
            real_RC = real_R[:, None] & (column_C < n_columns)[None, :]
            there = updates + matrix * n_rows * n_columns + place_R[:, None] * n_columns + column_C[None, :]
            update_RC = tl.load(there, mask=real_RC, other=0.0).to(tl.float32) * factor_R[:, None]
            here_RC = matrix * stride + row_R[:, None] * n_columns + column_C[None, :]
            main_RC = tl.load(mains + here_RC, mask=real_RC, other=0.0)
            decay_RC = weight_decay * main_RC
            if CAUTIOUS:
                decay_RC = tl.where(main_RC * update_RC >= 0, decay_RC, 0.0)
            main_RC -= rate * (update_RC + decay_RC)
            tl.store(mains + here_RC, main_RC, mask=real_RC)
            if HAS_VALUES:
                tl.store(values + here_RC, main_RC.to(values.dtype.element_ty), mask=real_RC)


def _grid(stack_NRC: Tensor) -> tuple[int, int]:
    return stack_NRC.size(0), triton.cdiv(stack_NRC.size(1), BLOCK_ROWS)


def launch_mix(
    grads_NRC: Tensor,
    momentum_NRC: Tensor,
    out_NRC: Tensor,
    squares_NR: Tensor,
    places_R: Tensor | None,
    grad_scale: Tensor,
    applied: Tensor,
    momentum: float,
    nesterov: bool,
) -> None:
    """As `mix_momentum`."""
    assert all(x.is_contiguous() for x in (grads_NRC[0], momentum_NRC, out_NRC, squares_NR))
    mix_kernel[_grid(grads_NRC)](
        grads_NRC, momentum_NRC, out_NRC, squares_NR, places_R, grad_scale, applied,
        grads_NRC.stride(0), *grads_NRC.shape[1:], momentum, nesterov, places_R is not None, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


def launch_apply(
    mains_NRC: Tensor,
    values_NRC: Tensor | None,
    updates_NRC: Tensor,
    factors_NR: Tensor,
    places_R: Tensor | None,
    lr: Tensor,
    applied: Tensor,
    weight_decay: float,
    cautious: bool,
) -> None:
    """As `apply_update`."""
    assert all(x.is_contiguous() for x in (mains_NRC[0], updates_NRC, factors_NR))
    assert values_NRC is None or values_NRC.stride() == mains_NRC.stride()
    apply_kernel[_grid(mains_NRC)](
        mains_NRC, values_NRC, updates_NRC, factors_NR, places_R, lr, applied, mains_NRC.stride(0), *mains_NRC.shape[1:],
        weight_decay, cautious, values_NRC is not None, places_R is not None, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
