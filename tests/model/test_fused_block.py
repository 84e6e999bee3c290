"""The fused block: exact against plain torch where nothing is rounded, and against Transformer Engine's modules in FP8 on a GPU."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.interpreter import run_interpreted

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.layer_ops import Matrix, Slot
from yxanul_nemo.model import fused_block
from yxanul_nemo.model.delayed_scales import BACKWARD, FORWARD

EPS, WIDTH, FFN, HEADS = 1e-5, 24, 40, Heads(2, 2, 16)


def unrounded_slots() -> dict[str, Slot]:
    """Scales that are no powers of two, in FP32, so that a scale left out or taken twice would show."""
    scales = (torch.full((1,), 3.0 + number) for number in range(len(FORWARD + BACKWARD)))
    return {
        name: Slot(torch.float32, scale, 1 / scale, torch.zeros(1))
        for name, scale in zip(FORWARD + BACKWARD, scales, strict=True)
    }


def plain_calls() -> None:
    """`te_calls` in plain torch, for operands of any dtype. Each product takes the order that it takes on a GPU."""

    def times(x: Matrix, w: Matrix) -> torch.Tensor:
        return x.scale_inv * w.scale_inv

    fused_block.product = lambda x, weight, dtype: (x.rows @ weight.rows.t() * times(x, weight)).to(dtype)
    fused_block.input_gradient = lambda dy, weight, dtype: (dy.rows @ weight.columns.t() * times(dy, weight)).to(dtype)

    def weight_gradient(dy, x, dtype, into=None):
        found = (dy.columns @ x.columns.t() * times(dy, x)).to(dtype)
        return found if into is None else into.add_(found)

    fused_block.weight_gradient = weight_gradient

    def norm_gradient(dnormed, total, rstd, weight, direct):
        x = total * rstd[:, None]
        dx = dnormed * weight - x * (dnormed * weight * x).mean(dim=-1, keepdim=True)
        return dx * rstd[:, None] + (0 if direct is None else direct), (dnormed * x).sum(dim=0)

    fused_block.norm_gradient = norm_gradient


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[T, B, heads of their kind, head_dim] -> [T x B, heads x head_dim]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return (
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        .permute(2, 0, 1, 3)
        .flatten(0, 1)
        .flatten(1)
    )


def split(mixed_TBQ: torch.Tensor) -> tuple[torch.Tensor, ...]:
    mixed = mixed_TBQ.unflatten(-1, (HEADS.groups, HEADS.heads_per_group + 2, HEADS.head_dim))
    return mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]


def turned(x_TBND: torch.Tensor, angles_TD: torch.Tensor) -> torch.Tensor:
    a, b = x_TBND.chunk(2, dim=-1)
    angles = angles_TD[:, None, None]
    return x_TBND * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()


def make_layers(count: int, generator: torch.Generator) -> list[list[torch.Tensor]]:
    """Weights of layers in the order norm_1, qkv, proj, norm_2, fc1, fc2, and of the last norm."""
    random = partial(torch.randn, generator=generator)
    shapes = ((HEADS.qkv_width, WIDTH), (WIDTH, HEADS.out_width), (2 * FFN, WIDTH), (WIDTH, FFN))

    def layer() -> list[torch.Tensor]:
        qkv, proj, fc1, fc2 = (random(*shape) / shape[1] ** 0.5 for shape in shapes)
        return [1 + 0.2 * random(WIDTH), qkv, proj, 1 + 0.2 * random(WIDTH), fc1, fc2]

    return [[w.requires_grad_() for w in layer()] for _ in range(count)] + [
        [(1 + 0.2 * random(WIDTH)).requires_grad_()]
    ]


def plain(x_NH: torch.Tensor, layers: list, seq_len: int, angles_TD: torch.Tensor) -> torch.Tensor:
    *layers, (last,) = layers
    for norm_1, qkv, proj, norm_2, fc1, fc2 in layers:
        mixed = F.linear(F.rms_norm(x_NH, (WIDTH,), norm_1, EPS), qkv).view(seq_len, -1, HEADS.qkv_width)
        query, key, value = split(mixed)
        x_NH = x_NH + F.linear(attend(turned(query, angles_TD), turned(key, angles_TD), value), proj)
        gate, up = F.linear(F.rms_norm(x_NH, (WIDTH,), norm_2, EPS), fc1).chunk(2, dim=-1)
        x_NH = x_NH + F.linear(F.silu(gate) * up, fc2)
    return F.rms_norm(x_NH, (WIDTH,), last, EPS)


def fused(x_NH: torch.Tensor, layers: list, seq_len: int, angles_TD: torch.Tensor, is_mixed: bool) -> torch.Tensor:
    """`FusedBlock.forward` over these weights, with plain attention."""
    *layers, (last,) = layers
    slots = [unrounded_slots() for _ in layers]

    def module(norm_1, qkv, proj, norm_2, fc1, fc2) -> SimpleNamespace:
        attention = SimpleNamespace(
            heads=HEADS,
            takes_mixed=lambda tokens, dtype: is_mixed,
            attend=lambda q, k, v, mask, documents: attend(q, k, v).unflatten(0, (seq_len, -1)),
            linear_qkv=SimpleNamespace(layer_norm_weight=norm_1, weight=qkv),
            linear_proj=SimpleNamespace(weight=proj),
        )
        mlp = SimpleNamespace(
            linear_fc1=SimpleNamespace(layer_norm_weight=norm_2, weight=fc1), linear_fc2=SimpleNamespace(weight=fc2)
        )
        return SimpleNamespace(self_attention=attention, mlp=mlp)

    def window_attention(mixed_TBQ, angles, heads, starts):
        query, key, value = split(mixed_TBQ)
        return attend(turned(query, angles), turned(key, angles), value).unflatten(0, (seq_len, -1))

    fused_block.window_attention = window_attention
    block = SimpleNamespace(
        config=SimpleNamespace(fp8="hybrid", layernorm_epsilon=EPS),
        scales=SimpleNamespace(begin_pass=lambda is_training: slots),
        layers=[module(*weights) for weights in layers],
        final_layernorm=SimpleNamespace(weight=last),
    )
    x_TBH = x_NH.unflatten(0, (seq_len, -1))
    return fused_block.FusedBlock.forward(block, x_TBH, None, rotary_pos_emb=angles_TD[:, None, None]).flatten(0, 1)


def interpreted() -> None:
    """Run by `run_interpreted`."""
    plain_calls()
    generator = torch.Generator().manual_seed(0)
    seq_len, batch_size = 8, 4
    layers = make_layers(3, generator)
    x_NH = torch.randn(seq_len * batch_size, WIDTH, generator=generator, requires_grad=True)
    dout_NH = torch.randn(seq_len * batch_size, WIDTH, generator=generator)
    angles_TD = torch.outer(torch.arange(seq_len), torch.rand(HEADS.head_dim // 2, generator=generator)).repeat(1, 2)
    weights = [w for layer in layers for w in layer]
    expected = plain(x_NH, layers, seq_len, angles_TD)
    expected_grads = torch.autograd.grad(expected, (x_NH, *weights), dout_NH)
    for is_mixed in (False, True):
        found = fused(x_NH, layers, seq_len, angles_TD, is_mixed)
        grads = torch.autograd.grad(found, (x_NH, *weights), dout_NH)
        for ours, theirs in ((found, expected), *zip(grads, expected_grads, strict=True)):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    check_main_grads(layers, expected_grads[1:], partial(fused, x_NH, layers, seq_len, angles_TD, False), dout_NH)


def check_main_grads(layers: list, expected: tuple, forward: Callable[[], torch.Tensor], dout: torch.Tensor) -> None:
    """Gradients of matrices are added where there is a place for them; autograd gets those of the rest."""
    for w in (w for layer in layers for w in layer if w.dim() == 2):
        w.main_grad = torch.ones_like(w)
    forward().backward(dout)
    for w, grad in zip((w for layer in layers for w in layer), expected, strict=True):
        found = w.main_grad - 1 if w.dim() == 2 else w.grad
        assert (w.grad is None) == (w.dim() == 2)
        assert float((found - grad).norm() / grad.norm()) < 1e-5


def test_without_rounding_it_is_plain_torch() -> None:
    run_interpreted(__file__)


def gradients(fused_layers: bool, precision: str, seq_len: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch, after passes that scales are made from."""
    from tests.model.test_te_on_gpu import SHAPE, VOCAB, batch
    from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
    from yxanul_nemo.model.build import build_model
    from yxanul_nemo.model.fp8_state import forget_fp8_state

    forget_fp8_state()
    parallel = ParallelConfig(device="cuda", fused_layers=fused_layers)
    model = build_model(SHAPE, VOCAB, PrecisionConfig(name=precision), parallel, seed=1, seq_len=seq_len)
    assert isinstance(model.decoder, fused_block.FusedBlock) == (fused_layers and precision != "bf16")
    ids_BT, labels_BT = batch(seq_len)
    for _ in range(6):
        model.zero_grad()
        loss = model(ids_BT, labels_BT).mean()
        loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len", [8, 128, 256, 2048])
@pytest.mark.parametrize("precision", ["fp8_hybrid", "fp8_e4m3"])
def test_in_fp8_it_is_transformer_engine(precision: str, seq_len: int) -> None:
    """The same rounding at the same places, up to numbers that lie between two of FP8's: ours differ from theirs as theirs from BF16, or
    less, where independent errors would make it 1.4 times as much."""
    loss, grads = gradients(True, precision, seq_len)
    expected, expected_grads = gradients(False, precision, seq_len)
    _, exact_grads = gradients(False, "bf16", seq_len)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert grads.keys() == expected_grads.keys()

    def distance(ours: dict, theirs: dict, name: str) -> float:
        return float((ours[name] - theirs[name]).norm() / theirs[name].norm())

    for name in grads:
        of_theirs = distance(expected_grads, exact_grads, name)
        assert distance(grads, exact_grads, name) < 1.2 * of_theirs + 1e-2, name
        assert distance(grads, expected_grads, name) < 1.1 * of_theirs + 1e-2, name
