"""The Triton kernels behind `triton_linear_cross_entropy`, which says what they compute and launches them.

Names end in the axes of their tiles: t tokens, v rows of the table, r inner dimension, l tokens of a block of labels.
Descriptors load whole tiles and fill with zeros past the edges, so that the loops carry no masks.
"""

import triton
import triton.language as tl

from yxanul_nemo.kernels.raised_sums import HEADROOM, passes_limit

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _largest_logit(z_tr, e_desc, start, stop, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Largest logit of each token over rows start..stop, in powers of two."""
    largest_t = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for v in tl.range(start, stop, BLOCK_V):
        x_tv = tl.dot(z_tr, e_desc.load([v, 0]).T) * LOG2E
        inside_v = v + tl.arange(0, BLOCK_V) < stop
        largest_t = tl.maximum(largest_t, tl.max(tl.where(inside_v[None, :], x_tv, float("-inf")), 1))
    return largest_t


@triton.jit
def _sum_exponentials(
    z_tr,
    e_desc,
    reference_t,
    start,
    stop,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WANTS_MEAN: tl.constexpr,
):
    """Sums of w = 2^(logit - reference) and of w * e over rows start..stop."""
    sum_t = tl.zeros([BLOCK_T], tl.float32)
    sum_tr = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    whole = start + (stop - start) // BLOCK_V * BLOCK_V
    for v in tl.range(start, whole, BLOCK_V):
        e_vr = e_desc.load([v, 0])
        w_tv = tl.exp2(tl.dot(z_tr, e_vr.T) * LOG2E - reference_t[:, None])
        sum_t += tl.sum(w_tv, 1)
        if WANTS_MEAN:
            sum_tr = tl.dot(w_tv.to(e_vr.dtype), e_vr, sum_tr)
    # Masking only the last, partial tile keeps the loop above free of it.
    if whole < stop:
        e_vr = e_desc.load([whole, 0])
        x_tv = tl.dot(z_tr, e_vr.T) * LOG2E - reference_t[:, None]
        inside_v = whole + tl.arange(0, BLOCK_V) < stop
        w_tv = tl.exp2(tl.where(inside_v[None, :], x_tv, float("-inf")))
        sum_t += tl.sum(w_tv, 1)
        if WANTS_MEAN:
            sum_tr = tl.dot(w_tv.to(e_vr.dtype), e_vr, sum_tr)
    return sum_t, sum_tr


@triton.jit
def head_forward_kernel(
    z_ptr,
    e_desc,
    lse_ptr,
    mean_ptr,
    tokens,
    inner,
    valid_rows,
    per_range,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WANTS_MEAN: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    inside_tr = (t[:, None] < tokens) & (r[None, :] < inner)
    offset_tr = t[:, None] * inner + r[None, :]
    z_tr = tl.load(z_ptr + offset_tr, mask=inside_tr, other=0.0)
    start = tl.program_id(1) * per_range
    stop = tl.minimum(start + per_range, valid_rows)

    first_stop = tl.minimum(start + BLOCK_V, stop)
    reference_t = _largest_logit(z_tr, e_desc, start, first_stop, BLOCK_T, BLOCK_V) + HEADROOM
    sum_t, sum_tr = _sum_exponentials(z_tr, e_desc, reference_t, start, stop, BLOCK_T, BLOCK_V, BLOCK_R, WANTS_MEAN)
    if passes_limit(sum_t):
        reference_t = _largest_logit(z_tr, e_desc, start, stop, BLOCK_T, BLOCK_V)
        sum_t, sum_tr = _sum_exponentials(z_tr, e_desc, reference_t, start, stop, BLOCK_T, BLOCK_V, BLOCK_R, WANTS_MEAN)

    part = tl.program_id(1).to(tl.int64) * tokens
    tl.store(lse_ptr + part + t, (reference_t + tl.log2(sum_t)) / LOG2E, mask=t < tokens)
    if WANTS_MEAN:
        tl.store(mean_ptr + part * inner + offset_tr, sum_tr * (1.0 / sum_t)[:, None], mask=inside_tr)


@triton.jit
def label_kernel(
    z_ptr,
    e_ptr,
    row_ptr,
    lse_st_ptr,
    lse_ptr,
    label_logit_ptr,
    tokens,
    inner,
    ranges,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    inside_t = t < tokens
    row_t = tl.load(row_ptr + t, mask=inside_t, other=-1)
    inside_tr = (row_t[:, None] >= 0) & (r[None, :] < inner)
    z_tr = tl.load(z_ptr + t[:, None] * inner + r[None, :], mask=inside_tr, other=0.0).to(tl.float32)
    e_tr = tl.load(e_ptr + row_t[:, None] * inner + r[None, :], mask=inside_tr, other=0.0).to(tl.float32)
    tl.store(label_logit_ptr + t, tl.sum(z_tr * e_tr, 1), mask=inside_t)

    largest_t = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for s in range(ranges):
        largest_t = tl.maximum(largest_t, tl.load(lse_st_ptr + s * tokens + t, mask=inside_t, other=0.0))
    # A process without valid rows has nothing but -inf, which must not become -inf - -inf.
    reference_t = tl.where(largest_t > float("-inf"), largest_t, 0.0)
    sum_t = tl.zeros([BLOCK_T], tl.float32)
    for s in range(ranges):
        sum_t += tl.exp(tl.load(lse_st_ptr + s * tokens + t, mask=inside_t, other=0.0) - reference_t)
    tl.store(lse_ptr + t, reference_t + tl.log(sum_t), mask=inside_t)


@triton.jit
def dz_kernel(
    g_ptr,
    e_ptr,
    row_ptr,
    lse_ptr,
    lse_st_ptr,
    mean_ptr,
    dz_ptr,
    tokens,
    inner,
    ranges,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    inside_t = t < tokens
    inside_tr = inside_t[:, None] & (r[None, :] < inner)
    offset_tr = t[:, None] * inner + r[None, :]
    row_t = tl.load(row_ptr + t, mask=inside_t, other=-1)
    lse_t = tl.load(lse_ptr + t, mask=inside_t, other=0.0)
    g_t = tl.load(g_ptr + t, mask=inside_t, other=0.0)
    label_tr = (row_t[:, None] >= 0) & (r[None, :] < inner)
    d_tr = -tl.load(e_ptr + row_t[:, None] * inner + r[None, :], mask=label_tr, other=0.0).to(tl.float32)
    for s in range(ranges):
        share_t = tl.exp(tl.load(lse_st_ptr + s * tokens + t, mask=inside_t, other=0.0) - lse_t)
        d_tr += share_t[:, None] * tl.load(mean_ptr + offset_tr, mask=inside_tr, other=0.0)
        # Moved step by step because all ranges together may pass 2^31 elements.
        mean_ptr += tokens * inner
    # Not a bare product: a token without weight keeps a gradient of 0 even where its input is not finite.
    d_tr = tl.where(g_t[:, None] == 0.0, 0.0, g_t[:, None] * d_tr)
    tl.store(dz_ptr + offset_tr, d_tr.to(dz_ptr.dtype.element_ty), mask=inside_tr)


@triton.jit
def bias_kernel(g_ptr, largest_ptr, lse_ptr, bias_ptr, tokens, padded_tokens, BLOCK_T: tl.constexpr):
    """Logarithm of weight over sum of exponentials, per token: row 0 for negative weights, row 1 for positive ones."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    sign = tl.program_id(1)
    g_t = tl.load(g_ptr + t, mask=t < tokens, other=0.0)
    g_t = tl.where(sign == 0, -g_t, g_t)
    bias_t = tl.log(g_t / tl.load(largest_ptr)) - tl.load(lse_ptr + t, mask=t < tokens, other=0.0)
    # Padding and the other sign's tokens get weight exp(-inf) = 0; a NaN stays one.
    bias_t = tl.where(g_t <= 0.0, float("-inf"), bias_t)
    tl.store(bias_ptr + sign * padded_tokens + t, bias_t, mask=t < padded_tokens)


@triton.jit
def de_kernel(
    e_ptr,
    z_desc,
    z_ptr,
    g_ptr,
    largest_ptr,
    sweeps_ptr,
    bias_ptr,
    sorted_row_ptr,
    token_ptr,
    first_label_ptr,
    de_ptr,
    padded_tokens,
    inner,
    valid_rows,
    rows,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block = tl.program_id(0)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    r = tl.arange(0, BLOCK_R)
    valid_vr = (v[:, None] < valid_rows) & (r[None, :] < inner)
    offset_vr = v[:, None] * inner + r[None, :]
    e_vr = tl.load(e_ptr + offset_vr, mask=valid_vr, other=0.0)
    de_vr = tl.zeros([BLOCK_V, BLOCK_R], tl.float32)

    # The exponent holds the logarithm of the weight, which costs nothing but knows no sign: where there are negative
    # weights a first sweep sums them, and its result changes sign before the sweep over the positive ones.
    sweeps = tl.load(sweeps_ptr)
    for sweep in range(sweeps):
        de_vr = -de_vr
        sweep_bias_ptr = bias_ptr + (sweep + 2 - sweeps) * padded_tokens + tl.arange(0, BLOCK_T)
        for t in tl.range(0, padded_tokens, BLOCK_T):
            z_tr = z_desc.load([t, 0])
            # The product starts from the bias: as a second operand of the exponent it would take registers that the
            # sums need.
            bias_vt = tl.broadcast_to(tl.load(sweep_bias_ptr + t)[None, :], (BLOCK_V, BLOCK_T))
            w_vt = tl.exp2(tl.dot(e_vr, z_tr.T, bias_vt) * LOG2E)
            de_vr = tl.dot(w_vt.to(z_tr.dtype), z_tr, de_vr)

    largest = tl.load(largest_ptr)
    last_label = tl.load(first_label_ptr + block + 1)
    for label in range(tl.load(first_label_ptr + block), last_label, BLOCK_L):
        i = label + tl.arange(0, BLOCK_L)
        row_l = tl.load(sorted_row_ptr + i, mask=i < last_label, other=-1)
        t_l = tl.load(token_ptr + i, mask=i < last_label, other=0)
        g_l = tl.load(g_ptr + t_l, mask=i < last_label, other=0.0) / largest
        inside_lr = (i[:, None] < last_label) & (r[None, :] < inner)
        z_lr = tl.load(z_ptr + t_l[:, None] * inner + r[None, :], mask=inside_lr, other=0.0)
        w_vl = tl.where(v[:, None] == row_l[None, :], -g_l[None, :], 0.0)
        de_vr = tl.dot(w_vl.to(z_lr.dtype), z_lr, de_vr)

    de_vr = tl.where(valid_vr, de_vr * largest, 0.0)
    tl.store(de_ptr + offset_vr, de_vr.to(de_ptr.dtype.element_ty), mask=(v[:, None] < rows) & (r[None, :] < inner))
