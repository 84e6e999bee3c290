"""What `stage=check` says of attention, for GPUs that are not here."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.launch.check import own_attention

LENGTHS = (8, 64, 100, 128, 256, 300, 2048, 4096)
HOPPER, ADA, BLACKWELL = (9, 0), (8, 9), (10, 0)
SHORT = dict.fromkeys((8, 64, 100, 128), "window kernel")
TILED = SHORT | dict.fromkeys((128, 256, 2048), "tiled kernels")


@pytest.mark.parametrize(
    ("capability", "dtype", "overrides", "expected"),
    [
        (HOPPER, torch.bfloat16, (), TILED),
        (HOPPER, torch.bfloat16, ("parallel.tensor_parallel=2",), TILED),
        (HOPPER, torch.bfloat16, ("parallel.tiled_attention=false",), SHORT),
        (HOPPER, torch.bfloat16, ("precision=fp8_hybrid", "precision.fp8_attention=true"), SHORT),
        (HOPPER, torch.bfloat16, ("parallel.context_parallel=2",), {}),
        (HOPPER, torch.float32, (), {}),
        (ADA, torch.bfloat16, (), SHORT),
        (BLACKWELL, torch.bfloat16, (), SHORT),
    ],
)
def test_attention_goes_through_the_kernels_that_are_for_it(
    capability: tuple[int, int], dtype: torch.dtype, overrides: tuple[str, ...], expected: dict[int, str]
) -> None:
    config = parse(compose(["recipe=yxanul_197m_h100", "curriculum=fixed_2048", *overrides]))
    found = {seq_len: own_attention(config, dtype, seq_len, capability) for seq_len in LENGTHS}
    assert {seq_len: kind for seq_len, kind in found.items() if kind} == expected
