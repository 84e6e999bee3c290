"""Attention by tiles against torch's own in FP64: in FP32 with Triton's interpreter on a CPU, in BF16 on a GPU."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from benchmarks.attention import exact_attention, relative_errors, results
from tests.kernels.interpreter import run_interpreted
from tests.kernels.test_window_attention import random_starts
from yxanul_nemo.kernels import causal_attention as tiled
from yxanul_nemo.kernels.attention_limits import BLOCK
from yxanul_nemo.kernels.causal_attention import (
    ENOUGH_PROGRAMS,
    SHORTEST_PARTED,
    causal_attention,
    parts_of_heads,
)
from yxanul_nemo.kernels.heads import Heads

YXANUL_197M = Heads(groups=2, heads_per_group=6, head_dim=64)
ORDINARY, SURE = 1.0, 60.0
"""Size of queries: at the second a key can be 2^500 times as likely as another, so that sums relative to a query's own tile overflow."""


def inputs(seq_len, windows, heads, dtype, device, size=ORDINARY):
    """Queries, keys, values and the gradient of the output."""
    torch.manual_seed(seq_len)
    n_heads = heads.groups * heads.heads_per_group
    query, key, value = (
        torch.randn(seq_len, windows, n, heads.head_dim, device=device) for n in (n_heads, heads.groups, heads.groups)
    )
    dout = torch.randn(seq_len, windows, heads.out_width, device=device).to(dtype)
    return [x.to(dtype).requires_grad_() for x in (query * size, key, value)], dout


def errors(seq_len, windows, heads, dtype, device, size=ORDINARY, documents=None):
    """Relative errors of output and gradients; with documents of about a `documents`-th of a window, of attention inside them."""
    given, dout = inputs(seq_len, windows, heads, dtype, device, size)
    starts_BT = None if documents is None else random_starts(seq_len, windows, device, documents)
    found = results(partial(causal_attention, starts_BT=starts_BT), given, dout)
    doubled = [x.detach().double().requires_grad_() for x in given]
    return relative_errors(found, results(partial(exact_attention, starts_BT=starts_BT), doubled, dout.double()))


def test_the_kernels_equal_exact_attention_in_the_interpreter():
    assert len(run_interpreted(__file__).split()) == 11


def interpreted():
    """Some lengths, shapes of heads and parts of them; the last has keys that are far likelier than those of a query's own tile."""
    cases = [
        (1, 1, Heads(1, 1, 16), 1, None),
        (2, 3, Heads(2, 3, 32), 1, None),
        (2, 3, Heads(2, 3, 32), 3, None),
        (3, 1, Heads(1, 2, 64), 1, None),
        (4, 1, Heads(3, 1, 16), 1, None),
        (2, 2, Heads(2, 4, 16), 2, 3),
        # No boundary but the window's, some, and tiles whose keys no later tile sees.
        (3, 2, Heads(1, 2, 16), 2, 0),
        (4, 2, Heads(2, 1, 16), 1, 3),
        (5, 1, Heads(1, 2, 16), 1, 10),
        (3, 2, Heads(2, 1, 16), 1, 100),
    ]
    for tiles, windows, heads, parts, documents in cases:
        # Just enough in that many parts.
        tiled.SHORTEST_PARTED, tiled.ENOUGH_PROGRAMS = 0, tiles * windows * heads.groups * parts
        found = errors(tiles * BLOCK, windows, heads, torch.float32, "cpu", documents=documents)
        assert max(found) < 1e-5, (tiles, heads, parts, documents, found)
        print(tiles)
    # Gradients through a softmax that is all but certain are differences of almost equal numbers.
    found = errors(3 * BLOCK, 1, Heads(1, 2, 16), torch.float32, "cpu", SURE)
    assert found[0] < 1e-5 and max(found) < 1e-2, found
    print(SURE)


@pytest.mark.parametrize(
    ("programs", "per_group", "parts"),
    [
        (2048, 6, 1),
        (ENOUGH_PROGRAMS, 6, 1),
        (ENOUGH_PROGRAMS - 1, 6, 2),
        (150, 6, 3),
        (4, 6, 6),
        (150, 7, 7),
        (4, 1, 1),
    ],
)
def test_heads_are_parted_until_there_are_enough_programs(programs, per_group, parts):
    assert parts_of_heads(2048, programs, per_group) == parts
    assert parts_of_heads(SHORTEST_PARTED - BLOCK, programs, per_group) == 1, "short windows"


def test_a_query_that_is_surer_of_far_keys_than_any_sum_holds_is_summed_again():
    """What the interpreter's last case relies on: without that, its sums would be infinite."""
    (query, key, _), _ = inputs(3 * BLOCK, 1, Heads(1, 2, 16), torch.float32, "cpu", SURE)
    score_HTT = torch.einsum("tbhd,sbgd->hts", query, key).detach() * 16**-0.5 * torch.log2(torch.tensor(torch.e))
    before = score_HTT[:, 2 * BLOCK :, : 2 * BLOCK].amax(dim=-1)
    own = torch.stack(
        [score_HTT[:, 2 * BLOCK + i, 2 * BLOCK : 2 * BLOCK + i + 1].amax(dim=-1) for i in range(BLOCK)], -1
    )
    assert (before - own).max() > 128 + 64


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("seq_len", "windows"),
    [*((seq_len, 2) for seq_len in (64, 128, 192, 256, 512, 768, 1024, 2048)), (256, 64), (256, 128), (1024, 16)],
)
def test_bf16_follows_exact_attention(seq_len, windows):
    """Probabilities and their gradients are rounded to BF16 once, before products."""
    found = errors(seq_len, windows, YXANUL_197M, torch.bfloat16, "cuda")
    assert max(found) < 6e-3, found


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [0, 4, 100])
@pytest.mark.parametrize("seq_len", [128, 192, 512, 2048])
def test_bf16_inside_documents_follows_exact_attention(seq_len, documents):
    found = errors(seq_len, 2, YXANUL_197M, torch.bfloat16, "cuda", documents=documents)
    assert max(found) < 6e-3, found


@pytest.mark.gpu
def test_likelier_keys_in_bf16():
    found = errors(512, 2, YXANUL_197M, torch.bfloat16, "cuda", SURE)
    assert found[0] < 1e-2 and all(torch.tensor(found).isfinite()), found


@pytest.mark.gpu
def test_repeated_results_are_equal_bit_by_bit_also_in_a_graph():
    given, dout = inputs(256, 64, YXANUL_197M, torch.bfloat16, "cuda")
    once = results(causal_attention, given, dout)
    again = results(causal_attention, given, dout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = results(causal_attention, given, dout)
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(once, again, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.gpu
def test_a_nan_stays_one():
    (query, key, value), _ = inputs(128, 1, YXANUL_197M, torch.bfloat16, "cuda")
    with torch.no_grad():
        query[100, 0, 3] = float("nan")
        out_TBO = causal_attention(query, key, value).view(128, 1, 12, 64)
    assert out_TBO[100, 0, 3].isnan().all() and out_TBO.isnan().sum() == 64
