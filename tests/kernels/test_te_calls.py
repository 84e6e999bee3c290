"""Transformer Engine's calls against the same in FP64 (needs a GPU)."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from yxanul_nemo.kernels.layer_ops import Matrix, Slot, add_norm, quantize
from yxanul_nemo.kernels.te_calls import input_gradient, norm_gradient, product, weight_gradient

pytestmark = pytest.mark.gpu


def quantized(tokens: int, width: int, dtype: torch.dtype, scale: float) -> tuple[Matrix, torch.Tensor]:
    scale_1 = torch.full((1,), scale, device="cuda")
    slot = Slot(dtype, scale_1, 1 / scale_1, torch.zeros(1, device="cuda"))
    matrix = quantize(torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16), slot)
    return matrix, matrix.rows.double() / scale


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(16, 16, 32), (48, 768, 1024), (4096, 768, 4096), (4096, 2048, 768)]
)
@pytest.mark.parametrize("gradient_dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_products_are_those_of_the_rounded_numbers(
    tokens: int, inputs: int, outputs: int, gradient_dtype: torch.dtype
) -> None:
    x, x_64 = quantized(tokens, inputs, torch.float8_e4m3fn, 50.0)
    weight, weight_64 = quantized(outputs, inputs, torch.float8_e4m3fn, 30.0)
    dy, dy_64 = quantized(tokens, outputs, gradient_dtype, 40.0)
    for found, expected in (
        (product(x, weight, torch.bfloat16), x_64 @ weight_64.t()),
        (input_gradient(dy, weight, torch.bfloat16), dy_64 @ weight_64),
        (weight_gradient(dy, x, torch.bfloat16), dy_64.t() @ x_64),
        (weight_gradient(dy, Matrix(None, x.columns, x.scale_inv), torch.float32), dy_64.t() @ x_64),
        (weight_gradient(dy, x, torch.float32, into=torch.ones(outputs, inputs, device="cuda")), 1 + dy_64.t() @ x_64),
    ):
        assert found.shape == expected.shape
        assert float((found.double() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize(("tokens", "width"), [(16, 256), (4096, 768), (1040, 1536)])
@pytest.mark.parametrize("has_other_use", [False, True])
def test_the_gradient_of_a_norm(tokens: int, width: int, has_other_use: bool) -> None:
    x, dnormed, direct = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weight = (torch.rand(width, device="cuda") + 0.5).bfloat16()
    total, _, rstd = add_norm(None, x, weight, 1e-5, None)
    found, found_weight = norm_gradient(dnormed, total, rstd, weight, direct if has_other_use else None)
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    F.rms_norm(wide, (width,), wide_weight, 1e-5).backward(dnormed.double())
    expected = wide.grad + (direct.double() if has_other_use else 0)
    for ours, theirs in ((found, expected), (found_weight, wide_weight.grad)):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 5e-3
