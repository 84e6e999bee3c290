"""Attention inside short windows against torch's own in FP64: with Triton's interpreter on a CPU, in BF16 on a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from benchmarks.attention import exact_attention
from tests.kernels.interpreter import run_interpreted
from yxanul_nemo.kernels.attention_limits import LONGEST_SHORT_WINDOW, SHORT_HEAD_DIMS, why_not_short
from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.window_attention import window_attention

LENGTHS = (1, 2, 8, 16, 24, 32, 63, 64, 65, 100, 128)
MASKED_LENGTHS = (1, 8, 24, 64, 100, 128)
YXANUL_197M = Heads(groups=2, heads_per_group=6, head_dim=64)


def angles(seq_len, head_dim, device="cpu"):
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles_TH = torch.outer(torch.arange(seq_len, device=device).float(), 1 / 10000.0**exponents)
    return torch.cat((angles_TH, angles_TH), dim=-1)


def random_starts(seq_len, batch_size, device="cpu", documents=3):
    """So many documents in a window, about, some of a single token: the first token that each token sees [windows, tokens]."""
    begins = torch.rand(batch_size, seq_len, device=device) < documents / seq_len
    place_T = torch.arange(seq_len, dtype=torch.int32, device=device)
    return torch.where(begins, place_T, 0).cummax(dim=1).values


def reference(qkv_TBQ, angles_TD, heads, starts_BT=None):
    """RoPE by complex numbers, and torch's attention on repeated keys and values."""
    n_time, n_batch, _ = qkv_TBQ.shape
    half = heads.head_dim // 2
    x = qkv_TBQ.view(n_time, n_batch, heads.groups, heads.heads_per_group + 2, heads.head_dim)
    turn_TH = torch.polar(torch.ones_like(angles_TD[:, :half], dtype=x.dtype), angles_TD[:, :half].to(x.dtype))

    def rotated(y):
        turned = torch.complex(y[..., :half], y[..., half:]) * turn_TH[:, None, None, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    query, key = rotated(x[..., : heads.heads_per_group, :]), rotated(x[..., heads.heads_per_group : -1, :])
    return exact_attention(query.flatten(2, 3), key.squeeze(3), x[..., -1, :], starts_BT)


def errors(seq_len, batch_size, heads, dtype, device, masked=False):
    """Relative errors of output and gradient."""
    torch.manual_seed(seq_len)
    qkv_TBQ = torch.randn(seq_len, batch_size, heads.qkv_width, device=device).to(dtype).requires_grad_()
    angles_TD = angles(seq_len, heads.head_dim, device)
    starts_BT = random_starts(seq_len, batch_size, device) if masked else None
    out_TBO = window_attention(qkv_TBQ, angles_TD, heads, starts_BT)
    dout_TBO = torch.randn_like(out_TBO)
    (found,) = torch.autograd.grad(out_TBO, qkv_TBQ, dout_TBO)
    exact_TBQ = qkv_TBQ.detach().double().requires_grad_()
    exact_out = reference(exact_TBQ, angles_TD, heads, starts_BT)
    (exact,) = torch.autograd.grad(exact_out, exact_TBQ, dout_TBO.double())
    return [((a - b).norm() / b.norm()).item() for a, b in ((out_TBO, exact_out), (found, exact))]


def test_the_kernels_equal_exact_attention_in_the_interpreter():
    assert len(run_interpreted(__file__).split()) == len(LENGTHS) + 2 + len(MASKED_LENGTHS)


def interpreted():
    """All lengths in FP16 (the interpreter of Triton 3.6 cannot multiply BF16), with tiles that are full and tiles that are not."""
    cases = [(seq_len, 70 // seq_len + 2, Heads(2, 3, 32), False) for seq_len in LENGTHS]
    cases += [(16, 3, Heads(1, 1, 64), False), (100, 2, Heads(1, 2, 128), False)]
    cases += [(seq_len, 70 // seq_len + 2, Heads(2, 1, 32), True) for seq_len in MASKED_LENGTHS]
    for seq_len, batch_size, heads, masked in cases:
        out_error, grad_error = errors(seq_len, batch_size, heads, torch.float16, "cpu", masked)
        assert out_error < 1e-3 and grad_error < 1e-3, (seq_len, heads, masked, out_error, grad_error)
        print(seq_len)


def test_what_is_not_supported_is_named():
    assert why_not_short("bfloat16", LONGEST_SHORT_WINDOW, SHORT_HEAD_DIMS[0]) is None
    assert "float32" in why_not_short("float32", 8, 64)
    assert str(LONGEST_SHORT_WINDOW + 1) in why_not_short("bfloat16", LONGEST_SHORT_WINDOW + 1, 64)
    assert "48" in why_not_short("bfloat16", 8, 48)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("seq_len", "heads"),
    [(n, YXANUL_197M) for n in (1, 8, 16, 24, 32, 64, 100, 128)] + [(16, Heads(3, 2, 32)), (128, Heads(1, 1, 128))],
    ids=str,
)
def test_the_kernels_equal_exact_attention_in_bf16(seq_len, heads):
    for batch_size, masked in itertools.product((1, 37, 4096 // seq_len), (False, True)):
        out_error, grad_error = errors(seq_len, batch_size, heads, torch.bfloat16, "cuda", masked)
        assert out_error < 5e-3 and grad_error < 8e-3, (batch_size, masked, out_error, grad_error)


@pytest.mark.gpu
def test_the_same_inputs_give_the_same_bits_and_windows_do_not_touch():
    seq_len, heads = 8, YXANUL_197M
    qkv_TBQ = torch.randn(seq_len, 100, heads.qkv_width, device="cuda", dtype=torch.bfloat16)
    angles_TD = angles(seq_len, heads.head_dim, "cuda")
    first = window_attention(qkv_TBQ, angles_TD, heads)
    assert torch.equal(first, window_attention(qkv_TBQ, angles_TD, heads))
    changed = qkv_TBQ.clone()
    changed[:, 3] += 1
    changed[5:, 4] += 1
    second = window_attention(changed, angles_TD, heads)
    same = (first == second).all(dim=-1)
    assert not same[:, 3].all() and not same[5:, 4].any()
    same[:, 3] = True
    same[5:, 4] = True
    assert same.all()


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len", [8, 64, 128])
def test_documents_keep_their_bits_when_another_changes(seq_len):
    heads = YXANUL_197M
    qkv_TBQ = torch.randn(seq_len, 100, heads.qkv_width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    starts_BT = torch.zeros(100, seq_len, dtype=torch.int32, device="cuda")
    starts_BT[:, 5:] = 5
    changed = qkv_TBQ.detach().clone()
    changed[5:] += 1
    changed.requires_grad_()
    found = []
    for x in (qkv_TBQ, changed):
        out_TBO = window_attention(x, angles(seq_len, heads.head_dim, "cuda"), heads, starts_BT)
        found.append((out_TBO, *torch.autograd.grad(out_TBO.float().square().sum(), x)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[:5], other[:5]) and not torch.equal(one[5:], other[5:])
