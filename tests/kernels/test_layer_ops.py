"""What lies between a layer's products against plain torch: in BF16 on a GPU, and in FP32 in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.interpreter import run_interpreted

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from yxanul_nemo.kernels import layer_ops as ops
from yxanul_nemo.kernels.heads import Heads

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EPS = 1e-5


class Case:
    """Random inputs on one device, slots whose scales use most of a format's range, and comparison with what was computed in FP64."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, size: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, device=self.device, generator=self.generator) * size
        return drawn.to(self.dtype)

    def slot(self, dtype: torch.dtype, scale: float) -> ops.Slot:
        scale_1 = torch.full((1,), scale, device=self.device)
        return ops.Slot(dtype, scale_1, 1 / scale_1, torch.zeros(1, device=self.device))

    def holds(self, matrix: ops.Matrix, expected: torch.Tensor, slot: ops.Slot, orders: str = "both") -> None:
        """The matrix is `expected` rounded to FP8, in the orders that there should be; and its largest value is in the slot."""
        step = {E4M3: 2.0**-3, E5M2: 2.0**-2}[slot.dtype]
        assert (matrix.rows is not None, matrix.columns is not None) == (orders != "columns", orders != "rows")
        limit = step / 2 * expected.abs() + 2.0**-9 / slot.scale.double()
        for found in (matrix.rows, None if matrix.columns is None else matrix.columns.t()):
            if found is not None:
                assert found.dtype == slot.dtype and found.shape == expected.shape
                assert bool(((found.double() * slot.scale_inv.double() - expected).abs() <= 1.01 * limit).all())
        if matrix.rows is not None and matrix.columns is not None:
            assert torch.equal(matrix.rows.view(torch.uint8), matrix.columns.t().view(torch.uint8))
        if orders != "columns":
            assert float(slot.amax) == pytest.approx(float(expected.abs().max()), rel=1e-2)

    def near(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        limit = 1e-2 if self.dtype == torch.bfloat16 else 1e-5
        assert float((found.double() - expected).norm() / expected.norm()) < limit


def check_quantize(case: Case, tokens: int, width: int) -> None:
    x_TC, slot = case.random(tokens, width), case.slot(E4M3, 60.0)
    case.holds(ops.quantize(x_TC, slot), x_TC.double(), slot)


def check_norm(case: Case, tokens: int, width: int) -> None:
    y, residual = (case.random(tokens, width) for _ in range(2))
    weight = case.random(width) * 0.2 + 1
    total = (y.double() + residual.double()).to(case.dtype).double()
    normed = F.rms_norm(total, (width,), weight.double(), EPS)
    slot = case.slot(E4M3, 60.0)
    found, matrix, rstd = ops.add_norm(y, residual, weight, EPS, slot)
    case.near(found, total)
    case.near(rstd, (total.square().mean(dim=-1) + EPS).rsqrt())
    case.holds(matrix, normed, slot)
    alone, unscaled, again = ops.add_norm(None, found, weight, EPS, None)
    assert alone is found
    case.near(again, rstd.double())
    case.near(unscaled, normed)


def check_swiglu(case: Case, tokens: int, width: int) -> None:
    gate_up, dout = case.random(tokens, 2 * width), case.random(tokens, width, size=1e-3)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    (expected * dout.double()).sum().backward()
    out_slot, slot = case.slot(E4M3, 20.0), case.slot(E5M2, 1e6)
    case.holds(ops.swiglu(gate_up, out_slot), expected.detach(), out_slot, orders="rows")
    grad, again = ops.swiglu_backward(dout, gate_up, slot, out_slot)
    case.holds(grad, wide.grad, slot)
    case.holds(again, expected.detach(), out_slot, orders="columns")


def check_join_rope(case: Case, tokens: int, windows: int, positions: int, heads: Heads) -> None:
    """Against autograd through Llama's rotation of the split projection."""
    mixed = case.random(tokens, windows, heads.groups, heads.heads_per_group + 2, heads.head_dim)
    wide = mixed.double().requires_grad_()
    angles_TD = (
        torch.rand(positions, heads.head_dim // 2, device=case.device, generator=case.generator).repeat(1, 2) * 6
    )
    turn = angles_TD.double().repeat(tokens // positions, 1)[:, None, None, None]
    a, b = wide[..., :-1, :].chunk(2, dim=-1)
    turned = wide[..., :-1, :] * turn.cos() + torch.cat((-b, a), dim=-1) * turn.sin()
    query, key = turned[..., :-1, :].flatten(2, 3), turned[..., -1, :]
    grads = [case.random(*x.shape, size=1e-3) for x in (query, key, wide[..., -1, :])]
    sum((x * g.double()).sum() for x, g in zip((query, key, wide[..., -1, :]), grads, strict=True)).backward()
    slot = case.slot(E5M2, 1e6)
    angles_TH = angles_TD[:, : heads.head_dim // 2]
    matrix = ops.join_rope(*grads, (angles_TH.cos(), angles_TH.sin()), heads, windows, slot)
    case.holds(matrix, wide.grad.view(tokens * windows, -1), slot)


SMALL, LARGE = ((16, 48), (80, 128)), ((16, 48), (4096, 768), (1040, 1536), (272, 4096))
CHECKS = (check_quantize, check_norm, check_swiglu)
ROPES = (8, 6, 8, Heads(2, 3, 16)), (32, 1, 16, Heads(1, 2, 32)), (256, 16, 256, Heads(2, 6, 64))


def interpreted() -> None:
    """Run by `run_interpreted`."""
    case = Case("cpu", torch.float32)
    for check in CHECKS:
        for shape in SMALL:
            check(case, *shape)
    for shape in ROPES[:2]:
        check_join_rope(case, *shape)


def test_all_of_them_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: Callable[..., None], shape: tuple[int, int]) -> None:
    check(Case("cuda", torch.bfloat16), *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ROPES)
def test_join_rope_on_a_gpu(shape: tuple[int, int, int, Heads]) -> None:
    check_join_rope(Case("cuda", torch.bfloat16), *shape)
