"""Triton kernels of causal grouped-query attention. See `causal_attention` for the layout and the idea.

Letters: M queries of a tile and N keys and values of one, BLOCK each; D a head's width. Descriptors see [tokens, windows x heads x D],
heads counted through all windows, so that the tile of a head begins at column head x D; keys and values likewise. Scores are scaled by
`exponent` and 2 is raised to them; `lse` [windows x heads, tokens] FP32 is the base-2 logarithm of the sum over a query's keys. `starts`
[windows, tokens] int32 is the first token that each token sees, which never falls from one to the next (None: 0 for all); tiles that no
query of a tile sees are left out.
"""

import triton
import triton.language as tl

from yxanul_nemo.kernels.raised_sums import HEADROOM, passes_limit


@triton.jit
def _tile(tiles):
    """Number of the head and of the tile of this program."""
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles


@triton.jit
def _query_tile(seq_len, per_group: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: the head, the first of its queries, and the column of the keys and values that they see. Programs whose queries see
    most keys come first."""
    tiles = seq_len // BLOCK
    head, place = _tile(tiles)
    return head, (tiles - 1 - place) * BLOCK, head // per_group * WIDTH


@triton.jit
def _first_seen(starts, head, m, seq_len, heads: tl.constexpr, BLOCK: tl.constexpr):
    """The first token that each query of a tile sees."""
    return tl.load(starts + head // heads * seq_len + m + tl.arange(0, BLOCK))


@triton.jit
def _first_tile(start_M, BLOCK: tl.constexpr):
    """Where the first tile of keys begins that one of the queries sees."""
    first = 0
    if start_M is not None:
        first = tl.min(start_M, 0) // BLOCK * BLOCK
    return first


@triton.jit
def _scores(q_MD, k_ND, m, n, start_M, exponent, IS_OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Scaled scores of queries from m on and keys from n on, -inf where a query does not see a key. IS_OWN: keys may come after it."""
    place = tl.arange(0, BLOCK)
    score_MN = tl.dot(q_MD, k_ND.T) * exponent
    if IS_OWN:
        score_MN = tl.where(place[:, None] - place[None, :] >= n - m, score_MN, float("-inf"))
    if start_M is not None:
        score_MN = tl.where(n + place[None, :] >= start_M[:, None], score_MN, float("-inf"))
    return score_MN


@triton.jit
def _add_tile(score_MN, v_ND, reference_M, sum_M, out_MD):
    """Add a tile of keys to the sums of exponentials and of exponentials x values."""
    e_MN = tl.exp2(score_MN - reference_M[:, None])
    return sum_M + tl.sum(e_MN, 1), tl.dot(e_MN.to(v_ND.dtype), v_ND, out_MD)


@triton.jit
def tiled_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, starts, lse, seq_len, exponent,
    heads: tl.constexpr, per_group: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries of one head. Sums of exponentials are raised ones, from the queries' own tile on."""
    head, m, column = _query_tile(seq_len, per_group, WIDTH, BLOCK)
    # A function cannot return None.
    start_M = None
    if starts is not None:
        start_M = _first_seen(starts, head, m, seq_len, heads, BLOCK)
    first = _first_tile(start_M, BLOCK)
    q_MD = q_desc.load([m, head * WIDTH])
    reference_M, sum_M = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    out_MD = tl.zeros([BLOCK, WIDTH], tl.float32)
    # Once around; as a loop it shares its shared memory with the next.
    for n in tl.range(m, m + BLOCK, BLOCK):
        score_MN = _scores(q_MD, k_desc.load([n, column]), m, n, start_M, exponent, True, BLOCK)
        reference_M = tl.max(score_MN, 1) + HEADROOM
        sum_M, out_MD = _add_tile(score_MN, v_desc.load([n, column]), reference_M, sum_M, out_MD)
    for n in tl.range(first, m, BLOCK):
        score_MN = _scores(q_MD, k_desc.load([n, column]), m, n, start_M, exponent, False, BLOCK)
        sum_M, out_MD = _add_tile(score_MN, v_desc.load([n, column]), reference_M, sum_M, out_MD)
    if passes_limit(sum_M):
        reference_M = tl.full([BLOCK], float("-inf"), tl.float32)
        for n in tl.range(first, m + BLOCK, BLOCK):
            score_MN = _scores(q_MD, k_desc.load([n, column]), m, n, start_M, exponent, True, BLOCK)
            reference_M = tl.maximum(reference_M, tl.max(score_MN, 1))
        sum_M, out_MD = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
        for n in tl.range(first, m + BLOCK, BLOCK):
            score_MN = _scores(q_MD, k_desc.load([n, column]), m, n, start_M, exponent, True, BLOCK)
            sum_M, out_MD = _add_tile(score_MN, v_desc.load([n, column]), reference_M, sum_M, out_MD)
    tl.store(lse + head * seq_len + m + tl.arange(0, BLOCK), reference_M + tl.log2(sum_M))
    out_desc.store([m, head * WIDTH], (out_MD / sum_M[:, None]).to(q_MD.dtype))


@triton.jit
def _add_to_query_gradient(
    q_MD, dout_MD, k_desc, v_desc, m, n, column, start_M, lse_M, delta_M, dq_MD, exponent, IS_OWN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    k_ND = k_desc.load([n, column])
    p_MN = tl.exp2(_scores(q_MD, k_ND, m, n, start_M, exponent, IS_OWN, BLOCK) - lse_M[:, None])
    dp_MN = tl.dot(dout_MD, v_desc.load([n, column]).T)
    ds_MN = p_MN * (dp_MN - delta_M[:, None])
    return tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD)


@triton.jit
def query_gradient_kernel(
    q_desc, k_desc, v_desc, out_desc, dout_desc, dq_desc, starts, lse, delta, seq_len, exponent, scale,
    heads: tl.constexpr, per_group: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Same programs as `tiled_forward_kernel`. Leaves the sum of dout x out of each query in `delta`, which is shaped as `lse`."""
    head, m, column = _query_tile(seq_len, per_group, WIDTH, BLOCK)
    # A function cannot return None.
    start_M = None
    if starts is not None:
        start_M = _first_seen(starts, head, m, seq_len, heads, BLOCK)
    first = _first_tile(start_M, BLOCK)
    dout_MD = dout_desc.load([m, head * WIDTH])
    delta_M = tl.sum(dout_MD.to(tl.float32) * out_desc.load([m, head * WIDTH]).to(tl.float32), 1)
    at_M = head * seq_len + m + tl.arange(0, BLOCK)
    tl.store(delta + at_M, delta_M)
    lse_M = tl.load(lse + at_M)
    q_MD = q_desc.load([m, head * WIDTH])
    dq_MD = tl.zeros([BLOCK, WIDTH], tl.float32)
    for n in tl.range(first, m, BLOCK):
        dq_MD = _add_to_query_gradient(
            q_MD, dout_MD, k_desc, v_desc, m, n, column, start_M, lse_M, delta_M, dq_MD, exponent, False, BLOCK
        )
    for n in tl.range(m, m + BLOCK, BLOCK):
        dq_MD = _add_to_query_gradient(
            q_MD, dout_MD, k_desc, v_desc, m, n, column, start_M, lse_M, delta_M, dq_MD, exponent, True, BLOCK
        )
    dq_desc.store([m, head * WIDTH], (dq_MD * scale).to(q_MD.dtype))


@triton.jit
def _add_to_key_value_gradients(
    k_ND, v_ND, q_desc, dout_desc, starts, lse, delta, head, m, n, dk_ND, dv_ND, seq_len, exponent,
    IS_OWN: tl.constexpr, heads: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BLOCK)
    q_MD = q_desc.load([m, head * WIDTH])
    dout_MD = dout_desc.load([m, head * WIDTH])
    lse_M = tl.load(lse + head * seq_len + m + place)
    delta_M = tl.load(delta + head * seq_len + m + place)
    p_NM = tl.exp2(tl.dot(k_ND, q_MD.T) * exponent - lse_M[None, :])
    if IS_OWN:
        p_NM = tl.where(place[None, :] >= place[:, None], p_NM, 0.0)
    if starts is not None:
        start_M = _first_seen(starts, head, m, seq_len, heads, BLOCK)
        p_NM = tl.where(n + place[:, None] >= start_M[None, :], p_NM, 0.0)
    dv_ND = tl.dot(p_NM.to(dout_MD.dtype), dout_MD, dv_ND)
    ds_NM = p_NM * (tl.dot(v_ND, dout_MD.T) - delta_M[None, :])
    return tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND), dv_ND


@triton.jit
def key_value_gradients_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, starts, last_tile, lse, delta, seq_len, exponent, scale,
    PARTS: tl.constexpr, heads: tl.constexpr, per_group: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of keys and values, and all queries that see them, of one of PARTS equal parts of the group's heads, which have
    results of their own. `delta` is there already.

    last_tile: number of the last tile of queries that see one of these keys [windows, tiles] int32; None with `starts`.
    """
    tiles = seq_len // BLOCK
    part, place = _tile(tiles)
    group, per_part = part // PARTS, per_group // PARTS
    n, first_head = place * BLOCK, part * per_part
    k_ND = k_desc.load([n, group * WIDTH])
    v_ND = v_desc.load([n, group * WIDTH])
    dk_ND, dv_ND = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    for i in tl.range(0, per_part):
        dk_ND, dv_ND = _add_to_key_value_gradients(
            k_ND, v_ND, q_desc, dout_desc, starts, lse, delta, first_head + i, n, n, dk_ND, dv_ND, seq_len, exponent,
            True, heads, WIDTH, BLOCK,
        )  # fmt: skip
    # One loop over heads and tiles, because a loop's first loads are waited for.
    later = tiles - 1 - place
    if last_tile is not None:
        later = tl.load(last_tile + group // (heads // per_group) * tiles + place) - place
    for i in tl.range(0, per_part * later):
        head, m = first_head + i // later, n + (1 + i % later) * BLOCK
        dk_ND, dv_ND = _add_to_key_value_gradients(
            k_ND, v_ND, q_desc, dout_desc, starts, lse, delta, head, m, n, dk_ND, dv_ND, seq_len, exponent,
            False, heads, WIDTH, BLOCK,
        )  # fmt: skip
    dk_ND *= scale
    if PARTS == 1:
        dk_ND, dv_ND = dk_ND.to(k_ND.dtype), dv_ND.to(v_ND.dtype)
    dk_desc.store([n, part * WIDTH], dk_ND)
    dv_desc.store([n, part * WIDTH], dv_ND)
