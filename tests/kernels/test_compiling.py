"""All kernels compile for the GPUs that they are for, as the 197M model launches them, and keep their numbers in registers."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from tests.kernels.absent_gpu import compile_launches, spilled_bytes
from tests.kernels.test_window_attention import angles, random_starts
from yxanul_nemo.kernels import (
    attention_limits,
    causal_attention,
    layer_ops,
    muon_kernels,
    split_rope,
    symmetric_product,
    triton_linear_cross_entropy,
    window_attention,
)
from yxanul_nemo.kernels.heads import Heads
from yxanul_nemo.kernels.vocab_shard import VocabShard

HEADS = Heads(groups=2, heads_per_group=6, head_dim=64)
HIDDEN, FEED_FORWARD, RANK, ROWS = 768, 2048, 128, 1024
HOPPER, ADA = (9, 0), (8, 9)
LAUNCHES = {HOPPER: 46, ADA: 34}
MOST_SPILLED_BYTES = {"tiled_forward_kernel": 120, "key_value_gradients_kernel": 40, "window_backward_kernel": 460}
"""Per thread, of those that spill: two held back to fit five and three times on a multiprocessor, and short windows' backward pass, at 128
tokens on Hopper and at all lengths on Ada."""


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def through(out: torch.Tensor | tuple[torch.Tensor, ...], *inputs: torch.Tensor) -> None:
    """Launch the backward pass, too."""
    outs = (out,) if isinstance(out, torch.Tensor) else out
    torch.autograd.grad(outs, inputs, [torch.zeros_like(x) for x in outs])


def layers() -> None:
    """What `model.fused_block` does between products, of 256 tokens; gradients are in E5M2."""
    e4m3, e5m2 = (
        layer_ops.Slot(dtype, *(torch.ones(1) for _ in range(3))) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    )
    x, norm, gate_up = bf16(256, HIDDEN).detach(), bf16(HIDDEN).detach(), bf16(256, 2 * FEED_FORWARD).detach()
    for slot in (e4m3, e5m2):
        layer_ops.quantize(x, slot)
    for y, slot in ((None, e4m3), (x, e4m3), (x, None)):
        layer_ops.add_norm(y, x, norm, 1e-5, slot)
    layer_ops.swiglu(gate_up, e4m3)
    layer_ops.swiglu_backward(bf16(256, FEED_FORWARD).detach(), gate_up, e5m2, e4m3)
    heads = [bf16(64, 4, n, HEADS.head_dim).detach() for n in (12, 2, 2)]
    turn = (torch.ones(64, HEADS.head_dim // 2), torch.zeros(64, HEADS.head_dim // 2))
    layer_ops.join_rope(*heads, turn, HEADS, 4, e5m2)


def attention(capability: tuple[int, int]) -> None:
    """All kinds, over whole windows and inside documents."""
    for seq_len in (8, 64, 128):
        for starts_BT in (None, random_starts(seq_len, 16)):
            mixed = bf16(seq_len, 16, HEADS.qkv_width)
            through(window_attention.window_attention(mixed, angles(seq_len, 64), HEADS, starts_BT), mixed)
    mixed = bf16(256, 2, HEADS.qkv_width)
    through(split_rope.split_rope(mixed, angles(256, 64), HEADS), mixed)
    if capability[0] == attention_limits.TILED_CAPABILITY:
        # A group's heads in one and, as in a small batch of long windows, in parts.
        for seq_len in (128, causal_attention.SHORTEST_PARTED):
            for starts_BT in (None, random_starts(seq_len, 2)):
                inputs = [bf16(seq_len, 2, n, HEADS.head_dim) for n in (12, 2, 2)]
                through(causal_attention.causal_attention(*inputs, starts_BT), *inputs)


def head(capability: tuple[int, int]) -> None:
    """The loss and both gradients."""
    triton_linear_cross_entropy.Gpu.of = lambda device: triton_linear_cross_entropy.Gpu(capability, 132)
    z_TR, e_VR, labels_T = bf16(512, RANK), bf16(ROWS, RANK), torch.zeros(512, dtype=torch.long)
    shard = VocabShard.of(ROWS, ROWS - 3, None)
    through(triton_linear_cross_entropy.triton_linear_cross_entropy(z_TR, e_VR, labels_T, shard, -100), z_TR, e_VR)


def optimizer() -> None:
    """Muon of one layer's mixed projection and of its gate and up projection, and the products that it orthogonalizes with."""
    scalar, applied = torch.ones(()), torch.ones((), dtype=torch.bool)
    for rows, places in ((HEADS.qkv_width, torch.zeros(HEADS.qkv_width, dtype=torch.int32)), (2 * FEED_FORWARD, None)):
        main, update, of_rows = torch.zeros(1, rows, HIDDEN), bf16(1, rows, HIDDEN).detach(), torch.zeros(1, rows)
        muon_kernels.launch_mix(main, main, update, of_rows, places, scalar, applied, 0.95, True)
        muon_kernels.launch_apply(main, torch.empty_like(update), update, of_rows, places, scalar, applied, 0.1, True)
    gram, scale = bf16(2, HIDDEN, HIDDEN).detach(), torch.ones(2)
    for x in (bf16(2, FEED_FORWARD, HIDDEN).detach().mT, bf16(2, HIDDEN, FEED_FORWARD).detach()):
        symmetric_product.launch(x, 1.0, None, 0.0, 0.0, scale)
    symmetric_product.launch(gram, 2.0, gram, -1.0, 3.0, None)


def compile_all(capability: tuple[int, int]) -> None:
    """Print the name of each kernel launched and what it spills."""

    def work() -> None:
        layers()
        attention(capability)
        head(capability)
        optimizer()

    for kernel in compile_launches(capability, work):
        print(kernel.name, spilled_bytes(kernel))


@pytest.fixture(scope="module")
def reports() -> dict[tuple[int, int], list[list[str]]]:
    """What `compile_all` prints for each GPU, in processes of their own side by side."""
    code = f"import runpy, sys; runpy.run_path({__file__!r})['compile_all'](tuple(map(int, sys.argv[1:])))"
    started = {
        gpu: subprocess.Popen(
            [sys.executable, "-c", code, *map(str, gpu)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for gpu in LAUNCHES
    }
    found = {}
    for gpu, process in started.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found[gpu] = [line.split() for line in out.splitlines()]
    return found


@pytest.mark.parametrize("gpu", [HOPPER, ADA])
def test_kernels_compile_and_stay_in_registers(gpu: tuple[int, int], reports: dict) -> None:
    assert len(reports[gpu]) == LAUNCHES[gpu]
    too_many = [(name, stored) for name, stored in reports[gpu] if int(stored) > MOST_SPILLED_BYTES.get(name, 0)]
    assert too_many == []
