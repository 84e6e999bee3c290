"""Splitting and rotating in one kernel against torch in FP64: in Triton's interpreter on a CPU, and on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from tests.kernels.interpreter import run_interpreted
from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.split_rope import split_rope

CASES = [(1, 1, Heads(1, 1, 32)), (5, 3, Heads(2, 3, 64)), (130, 2, Heads(2, 6, 64)), (7, 9, Heads(3, 1, 128))]


def reference(qkv_TBQ, angles_TD, heads):
    """Complex numbers, in the precision of the input."""
    half = heads.head_dim // 2
    x = qkv_TBQ.view(*qkv_TBQ.shape[:2], heads.groups, heads.heads_per_group + 2, heads.head_dim)
    turn_TH = torch.polar(torch.ones_like(angles_TD[:, :half], dtype=x.dtype), angles_TD[:, :half].to(x.dtype))
    turned = torch.complex(x[..., :half], x[..., half:]) * turn_TH[:, None, None, None]
    rotated = torch.cat((turned.real, turned.imag), dim=-1)
    n = heads.heads_per_group
    return rotated[..., :n, :].flatten(2, 3), rotated[..., n, :], x[..., n + 1, :]


def check(seq_len, batch_size, heads, dtype, device, limit, repeats=1):
    """With `repeats`, so many windows stand one after another in each row."""
    torch.manual_seed(seq_len)
    qkv_TBQ = torch.randn(repeats * seq_len, batch_size, heads.qkv_width, device=device).to(dtype).requires_grad_()
    exponents = torch.arange(0, heads.head_dim, 2, device=device) / heads.head_dim
    angles_TH = torch.outer(torch.arange(seq_len, device=device).float(), 1 / 10000.0**exponents)
    angles_TD = torch.cat((angles_TH, angles_TH), dim=-1)
    found = split_rope(qkv_TBQ, angles_TD, heads)
    grads = [torch.randn_like(x) for x in found]
    exact_TBQ = qkv_TBQ.detach().double().requires_grad_()
    exact = reference(exact_TBQ, angles_TD.repeat(repeats, 1), heads)
    assert [x.shape for x in found] == [x.shape for x in exact]
    assert torch.equal(found[2].double(), exact[2]), "values are copied, not turned"
    (dqkv,) = torch.autograd.grad(found, qkv_TBQ, grads)
    (expected,) = torch.autograd.grad(exact, exact_TBQ, [g.double() for g in grads])
    for ours, wanted in zip((*found, dqkv), (*exact, expected), strict=True):
        assert ((ours - wanted).norm() / wanted.norm()).item() < limit


def interpreted():
    for case in CASES:
        check(*case, torch.bfloat16, "cpu", 4e-3)
        check(*case, torch.float32, "cpu", 1e-6)
        print(case)
    check(*CASES[1], torch.float32, "cpu", 1e-6, repeats=3)


def test_the_kernels_equal_exact_rotation_in_the_interpreter():
    assert run_interpreted(__file__).count("Heads") == len(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_equal_exact_rotation_on_a_gpu(case):
    check(*case, torch.bfloat16, "cuda", 4e-3)
    check(*case, torch.bfloat16, "cuda", 4e-3, repeats=5)
