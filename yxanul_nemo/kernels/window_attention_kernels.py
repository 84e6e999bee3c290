"""Triton kernels of attention inside short windows. See `window_attention` for the layout and the idea.

Letters: M rows of a tile, each a token; H half of a head's width; a row r of a program is token r % seq_len of window r // seq_len.
Rotation is that of RoPE (arXiv:2104.09864) in the rotate-half form: (a, b) -> (a cos - b sin, b cos + a sin).
"""

import triton
import triton.language as tl


@triton.jit
def _rows(batch_size, seq_len: tl.constexpr, windows: tl.constexpr, BLOCK_M: tl.constexpr):
    """Window and token of each row of this program, the row's place in [seq_len, batch], and which rows are real."""
    row_M = tl.arange(0, BLOCK_M)
    own_window_M = row_M // seq_len
    token_M = row_M % seq_len
    window_M = tl.program_id(0) * windows + own_window_M
    real_M = (own_window_M < windows) & (window_M < batch_size)
    place_M = token_M.to(tl.int64) * batch_size + window_M
    return own_window_M, token_M, place_M, real_M


@triton.jit
def _visible(starts, own_window_M, token_M, real_M, seq_len: tl.constexpr, windows: tl.constexpr):
    """Which rows [M, M] see which: those of their window up to themselves and, where `starts` is given, from their document's first on."""
    visible_MM = (own_window_M[:, None] == own_window_M[None, :]) & (token_M[:, None] >= token_M[None, :])
    if starts is not None:
        window_M = (tl.program_id(0) * windows + own_window_M).to(tl.int64)
        start_M = tl.load(starts + window_M * seq_len + token_M, mask=real_M, other=0)
        visible_MM = visible_MM & (token_M[None, :] >= start_M[:, None])
    return visible_MM


@triton.jit
def _halves(base, place_M, real_M, row_width: tl.constexpr, HALF: tl.constexpr):
    """The two halves [M, H] of a head that begins at `base` in every row."""
    at_MH = base + place_M[:, None] * row_width + tl.arange(0, HALF)[None, :]
    a_MH = tl.load(at_MH, mask=real_M[:, None], other=0.0)
    b_MH = tl.load(at_MH + HALF, mask=real_M[:, None], other=0.0)
    return a_MH, b_MH


@triton.jit
def _store_halves(base, place_M, real_M, a_MH, b_MH, row_width: tl.constexpr, HALF: tl.constexpr):
    at_MH = base + place_M[:, None] * row_width + tl.arange(0, HALF)[None, :]
    tl.store(at_MH, a_MH.to(base.dtype.element_ty), mask=real_M[:, None])
    tl.store(at_MH + HALF, b_MH.to(base.dtype.element_ty), mask=real_M[:, None])


@triton.jit
def _rotate(a_MH, b_MH, cos_MH, sin_MH):
    a, b = a_MH.to(tl.float32), b_MH.to(tl.float32)
    return (a * cos_MH - b * sin_MH).to(a_MH.dtype), (b * cos_MH + a * sin_MH).to(b_MH.dtype)


@triton.jit
def _angles(angles, token_M, HALF: tl.constexpr):
    angle_MH = tl.load(angles + token_M[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :])
    return tl.cos(angle_MH), tl.sin(angle_MH)


@triton.jit
def _probabilities(qa_MH, qb_MH, ka_MH, kb_MH, visible_MM, scale: tl.constexpr):
    """softmax of the visible scores [M, M]; rows that are not real see themselves, so that no row is empty."""
    score_MM = tl.dot(qa_MH, tl.trans(ka_MH))
    score_MM = tl.dot(qb_MH, tl.trans(kb_MH), score_MM)
    score_MM = tl.where(visible_MM, score_MM * (scale * 1.4426950408889634), float("-inf"))
    e_MM = tl.exp2(score_MM - tl.max(score_MM, axis=1)[:, None])
    return e_MM / tl.sum(e_MM, axis=1)[:, None]


@triton.jit(do_not_specialize=["batch_size"])
def window_forward_kernel(
    qkv,
    angles,
    starts,
    out,
    batch_size,
    seq_len: tl.constexpr,
    groups: tl.constexpr,
    heads_per_group: tl.constexpr,
    windows: tl.constexpr,
    scale: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: `windows` windows and one key/value head, looping over the query heads that share it."""
    width: tl.constexpr = 2 * HALF
    qkv_width: tl.constexpr = groups * (heads_per_group + 2) * width
    out_width: tl.constexpr = groups * heads_per_group * width
    group = tl.program_id(1)
    own_window_M, token_M, place_M, real_M = _rows(batch_size, seq_len, windows, BLOCK_M)
    visible_MM = _visible(starts, own_window_M, token_M, real_M, seq_len, windows)
    cos_MH, sin_MH = _angles(angles, token_M, HALF)

    first = qkv + group * ((heads_per_group + 2) * width)
    ka_MH, kb_MH = _halves(first + heads_per_group * width, place_M, real_M, qkv_width, HALF)
    ka_MH, kb_MH = _rotate(ka_MH, kb_MH, cos_MH, sin_MH)
    va_MH, vb_MH = _halves(first + (heads_per_group + 1) * width, place_M, real_M, qkv_width, HALF)
    for head in range(heads_per_group):
        qa_MH, qb_MH = _halves(first + head * width, place_M, real_M, qkv_width, HALF)
        qa_MH, qb_MH = _rotate(qa_MH, qb_MH, cos_MH, sin_MH)
        p_MM = _probabilities(qa_MH, qb_MH, ka_MH, kb_MH, visible_MM, scale).to(va_MH.dtype)
        head_out = out + (group * heads_per_group + head) * width
        _store_halves(head_out, place_M, real_M, tl.dot(p_MM, va_MH), tl.dot(p_MM, vb_MH), out_width, HALF)


@triton.jit(do_not_specialize=["batch_size"])
def window_backward_kernel(
    qkv,
    angles,
    starts,
    dout,
    dqkv,
    batch_size,
    seq_len: tl.constexpr,
    groups: tl.constexpr,
    heads_per_group: tl.constexpr,
    windows: tl.constexpr,
    scale: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Same programs as `window_forward_kernel`; probabilities are computed again, so nothing but the inputs was kept."""
    width: tl.constexpr = 2 * HALF
    qkv_width: tl.constexpr = groups * (heads_per_group + 2) * width
    out_width: tl.constexpr = groups * heads_per_group * width
    group = tl.program_id(1)
    own_window_M, token_M, place_M, real_M = _rows(batch_size, seq_len, windows, BLOCK_M)
    visible_MM = _visible(starts, own_window_M, token_M, real_M, seq_len, windows)
    cos_MH, sin_MH = _angles(angles, token_M, HALF)

    offset = group * ((heads_per_group + 2) * width)
    ka_MH, kb_MH = _halves(qkv + offset + heads_per_group * width, place_M, real_M, qkv_width, HALF)
    ka_MH, kb_MH = _rotate(ka_MH, kb_MH, cos_MH, sin_MH)
    va_MH, vb_MH = _halves(qkv + offset + (heads_per_group + 1) * width, place_M, real_M, qkv_width, HALF)
    dka_MH = tl.zeros((BLOCK_M, HALF), tl.float32)
    dkb_MH = tl.zeros((BLOCK_M, HALF), tl.float32)
    dva_MH = tl.zeros((BLOCK_M, HALF), tl.float32)
    dvb_MH = tl.zeros((BLOCK_M, HALF), tl.float32)
    for head in range(heads_per_group):
        qa_MH, qb_MH = _halves(qkv + offset + head * width, place_M, real_M, qkv_width, HALF)
        qa_MH, qb_MH = _rotate(qa_MH, qb_MH, cos_MH, sin_MH)
        p_MM = _probabilities(qa_MH, qb_MH, ka_MH, kb_MH, visible_MM, scale)
        head_dout = dout + (group * heads_per_group + head) * width
        da_MH, db_MH = _halves(head_dout, place_M, real_M, out_width, HALF)
        p16_MM = p_MM.to(da_MH.dtype)
        dva_MH = tl.dot(tl.trans(p16_MM), da_MH, dva_MH)
        dvb_MH = tl.dot(tl.trans(p16_MM), db_MH, dvb_MH)
        dp_MM = tl.dot(da_MH, tl.trans(va_MH))
        dp_MM = tl.dot(db_MH, tl.trans(vb_MH), dp_MM)
        ds_MM = p_MM * (dp_MM - tl.sum(p_MM * dp_MM, axis=1)[:, None]) * scale
        ds_MM = ds_MM.to(qa_MH.dtype)
        dka_MH = tl.dot(tl.trans(ds_MM), qa_MH, dka_MH)
        dkb_MH = tl.dot(tl.trans(ds_MM), qb_MH, dkb_MH)
        dqa_MH, dqb_MH = _rotate(tl.dot(ds_MM, ka_MH), tl.dot(ds_MM, kb_MH), cos_MH, -sin_MH)
        _store_halves(dqkv + offset + head * width, place_M, real_M, dqa_MH, dqb_MH, qkv_width, HALF)
    dka_MH, dkb_MH = _rotate(dka_MH, dkb_MH, cos_MH, -sin_MH)
    _store_halves(dqkv + offset + heads_per_group * width, place_M, real_M, dka_MH, dkb_MH, qkv_width, HALF)
    _store_halves(dqkv + offset + (heads_per_group + 1) * width, place_M, real_M, dva_MH, dvb_MH, qkv_width, HALF)
