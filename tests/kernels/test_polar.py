"""Polar factors against singular values in FP64 and against NVIDIA's Emerging-Optimizers; symmetric products in Triton against FP64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from emerging_optimizers.orthogonalized_optimizers import muon_utils

from tests.kernels.interpreter import run_interpreted
from yxanul_nemo.kernels import polar, symmetric_product
from yxanul_nemo.kernels.polar import COEFFICIENTS, polar_factors

SHAPES = [(3, 24, 40), (3, 40, 24), (2, 32, 32), (1, 1, 7), (2, 5, 1)]


def matrices(shape, seed=0, scale=1e-4):
    """Numbers as small as gradients may be, singular values from 1e-2 to 1 times the largest."""
    generator = torch.Generator().manual_seed(seed)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -2, s.size(-1), dtype=torch.float64).expand_as(s)
    return scale * u * s[:, None, :] @ v


def squares(x):
    return x.float().square().sum((1, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_come_near_1_and_vectors_stay(shape):
    x = matrices(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = polar_factors(x.float(), squares(x)).double()
    # In the basis of the singular vectors the result is diagonal.
    inside = u.mT @ found @ v.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.85 and values.max() < 1.15
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-4
    assert ((found - u @ v).norm() / (u @ v).norm()).item() < 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_is_that_of_emerging_optimizers(shape):
    x = matrices(shape, scale=1.0).float()
    expected = torch.stack([muon_utils.newton_schulz(one, len(COEFFICIENTS), "polar_express") for one in x])
    torch.testing.assert_close(polar_factors(x, squares(x)), expected, rtol=1e-4, atol=1e-5)


def test_scale_does_not_matter_and_zeros_stay():
    x = matrices((2, 16, 24)).float()
    both = polar_factors(torch.cat([x, 1e-6 * x]), torch.cat([squares(x), squares(1e-6 * x)]))
    torch.testing.assert_close(both[:2], both[2:], rtol=1e-4, atol=1e-5)
    zeros = torch.zeros(1, 4, 8)
    assert torch.equal(polar_factors(zeros, squares(zeros)), zeros)


def check_product(shape, is_tall, has_added, has_scale, device="cpu", dtype=torch.float32, limit=1e-6):
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, device=device).to(dtype)
    wide = x.mT if is_tall else x
    size = wide.size(1)
    added = torch.randn(shape[0], size, size, device=device).to(dtype)
    added = (added + added.mT) if has_added else None
    scale = torch.rand(shape[0], device=device) + 0.5 if has_scale else None
    found = symmetric_product.launch(wide, 0.7, added, -1.3, 2.5, scale)
    exact = 0.7 * wide.double() @ wide.double().mT + 2.5 * torch.eye(size, device=device)
    if has_added:
        exact -= 1.3 * added.double()
    if has_scale:
        exact *= scale.double()[:, None, None]
    assert torch.equal(found, found.mT)
    assert ((found - exact).norm() / exact.norm()).item() < limit


PRODUCTS = [
    ((2, 130, 70), False, True, True),
    ((1, 70, 300), True, True, False),
    ((2, 128, 64), False, False, True),
    ((1, 7, 5), True, False, False),
]


def interpreted():
    for case in PRODUCTS:
        check_product(*case)
        print("case")


def test_products_are_exact_in_the_interpreter():
    assert run_interpreted(__file__).count("case") == len(PRODUCTS)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [*PRODUCTS, ((3, 768, 2048), False, True, True), ((3, 2048, 768), True, True, True)], ids=str
)
def test_products_are_exact_on_a_gpu(case):
    check_product(*case, "cuda", torch.bfloat16, 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 768, 768), (4, 768, 2048), (4, 2048, 768), (4, 128, 768), (2, 40, 24)], ids=str)
def test_bf16_on_a_gpu_comes_near_the_polar_factor(shape):
    """Singular values off by less than 0.2 but for the smallest; the same bits when repeated."""
    x = matrices(shape).float()
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    found = polar_factors(x.cuda().bfloat16(), squares(x).cuda())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, polar_factors(x.cuda().bfloat16(), squares(x).cuda()))
    values = torch.linalg.svdvals(found.cpu().double())
    assert values.min() > 0.8 and values.max() < 1.2
    assert ((found.cpu().double() - u @ v).norm() / (u @ v).norm()).item() < 0.12


def test_the_torch_product_is_exact():
    x = torch.randn(2, 6, 9)
    added = torch.randn(2, 6, 6)
    added, scale = added + added.mT, torch.rand(2) + 0.5
    exact = scale[:, None, None] * (0.7 * x @ x.mT - 1.3 * added + 2.5 * torch.eye(6))
    torch.testing.assert_close(polar.symmetric_product(x, 0.7, added, -1.3, 2.5, scale), exact)
