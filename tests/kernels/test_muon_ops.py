"""Muon's passes over memory: Triton's kernels in its interpreter and on a GPU against plain torch, which is checked in FP64."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from tests.kernels.interpreter import run_interpreted
from yxanul_nemo.kernels import muon_kernels
from yxanul_nemo.kernels.muon_ops import apply_update, mix_momentum

SHAPES = [(3, 8, 96), (2, 13, 300), (1, 1, 1)]
CASES = list(itertools.product(SHAPES, (True, False), (True, False)))
"""Shape; whether rows have other places; the operation's own switch (Nesterov, caution)."""
MOMENTUM, DECAY, LR, SCALE = 0.9, 0.1, 0.02, 3.0


def tensors(shape, has_places, device):
    """Stacks of which the first is not dense, as where matrices are no multiple of the alignment."""
    generator = torch.Generator().manual_seed(sum(shape))
    padded = torch.randn(shape[0], shape[1] * shape[2] + 5, generator=generator)
    stack = padded.to(device)[:, : shape[1] * shape[2]].unflatten(1, shape[1:])
    other, rows = torch.randn(shape, generator=generator), torch.rand(shape[:2], generator=generator)
    places = torch.randperm(shape[1], generator=generator).to(device, torch.int32) if has_places else None
    return stack, other.to(device), rows.to(device), places


def exact_mix(grads, momentum, places, nesterov):
    """(momentum, what is orthogonalized, sums of squares) in FP64."""
    grads = grads.double() / SCALE
    momentum = MOMENTUM * momentum.double() + (1 - MOMENTUM) * grads
    mixed = MOMENTUM * momentum + (1 - MOMENTUM) * grads if nesterov else momentum
    if places is not None:
        mixed = mixed[:, places.long().argsort()]
    return momentum, mixed, mixed.square().sum(-1)


def exact_apply(mains, updates, factors, places, cautious):
    updates = updates.double() * factors.double()[..., None]
    if places is not None:
        updates = updates[:, places.long()]
    mains = mains.double()
    agrees = (mains * updates >= 0) if cautious else torch.ones_like(mains, dtype=torch.bool)
    return mains - LR * (updates + DECAY * mains * agrees)


def check(shape, has_places, switch, mix, apply, device="cpu", dtype=torch.float32):
    """Against FP64, and that nothing changes where the update is not applied."""
    grads, momentum, factors, places = tensors(shape, has_places, device)
    yes, no = (torch.tensor(x, device=device) for x in (True, False))
    scale, lr = torch.tensor(SCALE, device=device), torch.tensor(LR, device=device)
    expected = exact_mix(grads, momentum, places, switch)
    out, squares = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape[:2], device=device)
    before = momentum.clone()
    bad = grads * float("nan")
    mix(bad, momentum, out, squares, places, scale, no, MOMENTUM, switch)
    assert torch.equal(momentum, before)
    mix(grads, momentum, out, squares, places, scale, yes, MOMENTUM, switch)
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    for found, wanted in zip((momentum, out, squares), expected, strict=True):
        assert ((found - wanted).norm() / wanted.norm()).item() < (limit if found is out else 1e-6)

    mains, updates, factors, places = tensors(shape, has_places, device)
    before, expected = mains.clone(), exact_apply(mains, updates, factors, places, switch)
    values = None
    if dtype != torch.float32:
        values = torch.empty_strided(shape, mains.stride(), dtype=dtype, device=device).copy_(mains)
    apply(mains, values, updates * float("nan"), factors, places, lr, no, DECAY, switch)
    assert torch.equal(mains, before)
    assert values is None or torch.equal(values, before.to(dtype))
    apply(mains, values, updates, factors, places, lr, yes, DECAY, switch)
    if values is not None:
        # Triton's interpreter does not round to nearest.
        torch.testing.assert_close(values.float(), mains, rtol=2**-7, atol=0)
        assert device == "cpu" or torch.equal(values, mains.to(dtype))
    assert ((mains - expected).norm() / expected.norm()).item() < 1e-6
    assert ((mains - before).norm() / before.norm()).item() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_torch_is_the_exact_result(case):
    for dtype in (torch.float32, torch.bfloat16):
        check(*case, mix_momentum, apply_update, dtype=dtype)


def interpreted():
    for case in CASES:
        check(*case, muon_kernels.launch_mix, muon_kernels.launch_apply)
        check(*case, muon_kernels.launch_mix, muon_kernels.launch_apply, dtype=torch.bfloat16)
        print("case")


def test_the_kernels_are_the_exact_result_in_the_interpreter():
    assert run_interpreted(__file__).count("case") == len(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, ((28, 1024, 768), True, True), ((28, 4096, 768), False, True)], ids=str)
def test_the_kernels_are_the_exact_result_on_a_gpu(case):
    check(*case, mix_momentum, apply_update, "cuda", torch.bfloat16)
