"""Triton kernels of what a transformer layer does between its matrix products. See `layer_ops` for what each is and what it saves.

Letters: R rows of a tile, each a token; C its columns; H half of a head's width. All matrices are row-major. A result that goes into a
product is stored as `rows` [n_rows, width] and, where it is FP8, once more as `columns` [width, n_rows], because Hopper's and Ada's FP8
products read both operands along the summed dimension; `scale` (None: no FP8) multiplies it first, and `amax` takes its largest absolute
value.
"""

import triton
import triton.language as tl

IS_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)

FOUR_AT_ONCE = """{{
.reg .b16 low, high;
cvt.rn.satfinite.{name}x2.f32 low, $2, $1;
cvt.rn.satfinite.{name}x2.f32 high, $4, $3;
mov.b32 $0, {{low, high}};
}}"""
E4M3_OF_FOUR, E5M2_OF_FOUR = (tl.constexpr(FOUR_AT_ONCE.format(name=name)) for name in ("e4m3", "e5m2"))


@triton.jit
def _round(x_RC, dtype: tl.constexpr):
    """To nearest, saturating.

    Triton's own conversion gives two numbers at a time, which ptxas 12.9 merges into four for a store of rows; where they are needed
    singly too, as for columns, it then takes half of them from a register that was never written
    (https://github.com/triton-lang/triton/issues/11111). Here only the four together have a name.
    """
    if IS_COMPILED and (dtype == tl.float8e4nv or dtype == tl.float8e5):
        assembly: tl.constexpr = E4M3_OF_FOUR if dtype == tl.float8e4nv else E5M2_OF_FOUR
        bits_RC = tl.inline_asm_elementwise(assembly, "=r,r,r,r,r", [x_RC], dtype=tl.uint8, is_pure=True, pack=4)
        return bits_RC.to(dtype, bitcast=True)
    return x_RC.to(dtype)


@triton.jit
def _load(base, at, real):
    return tl.load(base + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _tile(n_rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of this program, and which of them are real."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row_R, column_C, row_R < n_rows, column_C < width


@triton.jit
def _gate_and_up(gate_up, row_R, column_C, real_RC, width):
    """Both halves of a tile of [n_rows, 2 x width]."""
    at_RC = row_R.to(tl.int64)[:, None] * (2 * width) + column_C[None, :]
    return _load(gate_up, at_RC, real_RC), _load(gate_up, at_RC + width, real_RC)


@triton.jit
def _put(x_RC, rows, columns, row_R, column_C, real_R, real_C, n_rows, width, dtype: tl.constexpr):
    """Store a tile of a matrix [n_rows, width], scaled already, in both orders or, with `rows` or `columns` None, in one."""
    x_RC = _round(x_RC, dtype)
    if rows is not None:
        at_RC = row_R.to(tl.int64)[:, None] * width + column_C[None, :]
        tl.store(rows + at_RC, x_RC, mask=real_R[:, None] & real_C[None, :])
    if columns is not None:
        at_CR = column_C.to(tl.int64)[:, None] * n_rows + row_R[None, :]
        tl.store(columns + at_CR, tl.trans(x_RC), mask=real_C[:, None] & real_R[None, :])


@triton.jit
def _factor(scale):
    """What numbers are multiplied by before they are rounded."""
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale)
    return factor


@triton.jit
def _note(amax, x_RC):
    """Take a tile's largest value. Most tiles find a larger one there already, and leave the one place that all of them look at alone."""
    largest = tl.max(tl.max(tl.abs(x_RC), axis=1), axis=0)
    tl.atomic_max(amax, largest, mask=largest > tl.load(amax), sem="relaxed")


@triton.jit
def quantize_kernel(x, rows, columns, scale, amax, n_rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [n_rows, width] -> rows, columns."""
    row_R, column_C, real_R, real_C = _tile(n_rows, width, BLOCK_R, BLOCK_C)
    at_RC = row_R.to(tl.int64)[:, None] * width + column_C[None, :]
    x_RC = _load(x, at_RC, real_R[:, None] & real_C[None, :])
    _note(amax, x_RC)
    dtype: tl.constexpr = rows.dtype.element_ty
    _put(x_RC * _factor(scale), rows, columns, row_R, column_C, real_R, real_C, n_rows, width, dtype)


@triton.jit
def add_norm_kernel(
    y, residual, weight, total, rstd, rows, columns, scale, amax, n_rows, eps,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """total = y + residual (or residual alone, where y is None), its RMSNorm -> rows, columns."""
    row_R, column_C = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    real_R, real_C = row_R < n_rows, column_C < WIDTH
    real_RC = real_R[:, None] & real_C[None, :]
    at_RC = row_R.to(tl.int64)[:, None] * WIDTH + column_C[None, :]
    x_RC = _load(residual, at_RC, real_RC)
    if y is not None:
        rounded_RC = (x_RC + _load(y, at_RC, real_RC)).to(total.dtype.element_ty)
        tl.store(total + at_RC, rounded_RC, mask=real_RC)
        x_RC = rounded_RC.to(tl.float32)
    rstd_R = tl.rsqrt(tl.sum(x_RC * x_RC, axis=1) / WIDTH + eps)
    tl.store(rstd + row_R, rstd_R, mask=real_R)
    x_RC = x_RC * rstd_R[:, None] * _load(weight, column_C, real_C)[None, :]
    if scale is not None:
        _note(amax, x_RC)
    dtype: tl.constexpr = rows.dtype.element_ty
    _put(x_RC * _factor(scale), rows, columns, row_R, column_C, real_R, real_C, n_rows, WIDTH, dtype)


@triton.jit
def swiglu_kernel(gate_up, rows, scale, amax, n_rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """silu(gate) x up of gate_up [n_rows, 2 x width] -> rows [n_rows, width]."""
    row_R, column_C, real_R, real_C = _tile(n_rows, width, BLOCK_R, BLOCK_C)
    real_RC = real_R[:, None] & real_C[None, :]
    gate_RC, up_RC = _gate_and_up(gate_up, row_R, column_C, real_RC, width)
    out_RC = gate_RC * tl.sigmoid(gate_RC) * up_RC
    _note(amax, out_RC)
    dtype: tl.constexpr = rows.dtype.element_ty
    _put(out_RC * _factor(scale), rows, None, row_R, column_C, real_R, real_C, n_rows, width, dtype)


@triton.jit
def swiglu_backward_kernel(
    dout, gate_up, rows, columns, scale, amax, out_columns, out_scale, n_rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The gradient of gate_up -> rows, columns; and `swiglu_kernel`'s result once more -> out_columns."""
    row_R, column_C, real_R, real_C = _tile(n_rows, width, BLOCK_R, BLOCK_C)
    real_RC = real_R[:, None] & real_C[None, :]
    gate_RC, up_RC = _gate_and_up(gate_up, row_R, column_C, real_RC, width)
    dout_RC = _load(dout, row_R.to(tl.int64)[:, None] * width + column_C[None, :], real_RC)
    sigmoid_RC = tl.sigmoid(gate_RC)
    silu_RC = gate_RC * sigmoid_RC
    dgate_RC = dout_RC * up_RC * (sigmoid_RC + silu_RC * (1 - sigmoid_RC))
    dup_RC = dout_RC * silu_RC
    _note(amax, tl.maximum(tl.abs(dgate_RC), tl.abs(dup_RC)))
    factor = _factor(scale)
    dtype: tl.constexpr = rows.dtype.element_ty
    _put(dgate_RC * factor, rows, columns, row_R, column_C, real_R, real_C, n_rows, 2 * width, dtype)
    _put(dup_RC * factor, rows, columns, row_R, column_C + width, real_R, real_C, n_rows, 2 * width, dtype)
    out_dtype: tl.constexpr = out_columns.dtype.element_ty
    out_RC = silu_RC * up_RC * _factor(out_scale)
    _put(out_RC, None, out_columns, row_R, column_C, real_R, real_C, n_rows, width, out_dtype)


@triton.jit
def join_rope_kernel(
    dquery, dkey, dvalue, cos, sin, rows, columns, scale, amax, n_rows, batch_size, positions,
    groups: tl.constexpr, per_group: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The mixed projection's gradient from those of rotated queries, rotated keys and values -> rows, columns.

    cos and sin [positions, HALF]. A program has the heads of a group, which turn alike.
    """
    group = tl.program_id(1)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_H = tl.arange(0, HALF)
    real_R, real_H = row_R < n_rows, i_H < HALF
    real_RH = real_R[:, None] & real_H[None, :]
    at_turn = (row_R // batch_size % positions)[:, None] * HALF + i_H[None, :]
    cos_RH, sin_RH = _load(cos, at_turn, real_RH), _load(sin, at_turn, real_RH)
    of_group_R1 = row_R.to(tl.int64)[:, None] * groups + group
    at_query, at_other = of_group_R1 * (per_group * 2 * HALF) + i_H[None, :], of_group_R1 * (2 * HALF) + i_H[None, :]
    width: tl.constexpr = groups * (per_group + 2) * 2 * HALF
    dtype: tl.constexpr = rows.dtype.element_ty
    factor = _factor(scale)
    largest_RH = tl.zeros((BLOCK_R, HALF), tl.float32)
    for place in tl.static_range(per_group + 2):
        if place < per_group:
            a_RH = _load(dquery, at_query + place * 2 * HALF, real_RH)
            b_RH = _load(dquery, at_query + place * 2 * HALF + HALF, real_RH)
        elif place == per_group:
            a_RH, b_RH = _load(dkey, at_other, real_RH), _load(dkey, at_other + HALF, real_RH)
        else:
            a_RH, b_RH = _load(dvalue, at_other, real_RH), _load(dvalue, at_other + HALF, real_RH)
        if place <= per_group:
            a_RH, b_RH = a_RH * cos_RH + b_RH * sin_RH, b_RH * cos_RH - a_RH * sin_RH
        largest_RH = tl.maximum(largest_RH, tl.maximum(tl.abs(a_RH), tl.abs(b_RH)))
        column_H = (group * (per_group + 2) + place) * (2 * HALF) + i_H
        _put(a_RH * factor, rows, columns, row_R, column_H, real_R, real_H, n_rows, width, dtype)
        _put(b_RH * factor, rows, columns, row_R, column_H + HALF, real_R, real_H, n_rows, width, dtype)
    _note(amax, largest_RH)
