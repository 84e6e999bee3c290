"""The choice of layers, attention and document handling, for GPUs that are not here."""

import pytest

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.model.layer_choices import (
    TILES,
    WIDEST_HIDDEN_SIZE,
    WINDOW,
    attention_of,
    lists_documents,
    why_not_fused,
)


def reason(*overrides: str) -> str | None:
    config = parse(compose(["recipe=yxanul_197m_h100", "precision=fp8_hybrid", *overrides]))
    return why_not_fused(config.model, config.precision, config.parallel)


def test_the_recipes_layers_are_fused() -> None:
    assert reason() is None
    assert reason("precision=fp8_e4m3") is None
    assert reason("precision.bf16_first_tokens=1e6") is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("precision=bf16",), "bf16"),
        (("precision=fp8_current",), "fp8_current"),
        (("precision=mxfp8",), "mxfp8"),
        (("precision.fp8_attention=true",), "fp8_attention"),
        (("parallel.tensor_parallel=2",), "share"),
        (("parallel.context_parallel=2",), "share"),
        (("parallel.fused_layers=false",), "fused_layers"),
        (("parallel.layer_spec=torch",), "layer_spec"),
        (("model.hidden_size=4608",), "hidden_size"),
        (("model.head_dim=96",), "head_dim"),
    ],
)
def test_others_are_left_to_transformer_engine(overrides: tuple[str, ...], expected: str) -> None:
    assert expected in (reason(*overrides) or "")


def test_the_widest_is_what_the_kernels_take() -> None:
    ops = pytest.importorskip("yxanul_nemo.kernels.layer_ops", reason="Triton is installed on Linux hosts only")
    assert WIDEST_HIDDEN_SIZE == ops.WIDEST_NORM


LENGTHS = (8, 64, 100, 128, 256, 300, 2048, 4096)
HOPPER, ADA, BLACKWELL = (9, 0), (8, 9), (10, 0)
SHORT = dict.fromkeys((8, 64, 100, 128), "window kernel")
TILED = SHORT | dict.fromkeys((128, 256, 2048), "tiled kernels")


@pytest.mark.parametrize(
    ("capability", "dtype", "overrides", "expected"),
    [
        (HOPPER, "bfloat16", (), TILED),
        (HOPPER, "bfloat16", ("parallel.tensor_parallel=2",), TILED),
        (HOPPER, "bfloat16", ("parallel.tiled_attention=false",), SHORT),
        (HOPPER, "bfloat16", ("precision=fp8_hybrid", "precision.fp8_attention=true"), SHORT),
        (HOPPER, "bfloat16", ("parallel.context_parallel=2",), {}),
        (HOPPER, "float32", (), {}),
        (ADA, "bfloat16", (), SHORT),
        (BLACKWELL, "bfloat16", (), SHORT),
    ],
)
def test_attention_goes_through_the_kernels_that_are_for_it(
    capability: tuple[int, int], dtype: str, overrides: tuple[str, ...], expected: dict[int, str]
) -> None:
    config = parse(compose(["recipe=yxanul_197m_h100", "curriculum=fixed_2048", *overrides]))
    settings = config.model, config.precision, config.parallel
    found = {seq_len: attention_of(*settings, seq_len, capability, dtype) for seq_len in LENGTHS}
    assert {seq_len: kind for seq_len, kind in found.items() if kind} == expected


def test_documents_are_listed_where_no_kernel_of_ours_takes_long_windows() -> None:
    assert lists_documents("bfloat16", 256, None) and lists_documents("bfloat16", 4096, None)
    assert not lists_documents("bfloat16", 256, TILES)
    assert not lists_documents("bfloat16", 128, WINDOW) and not lists_documents("bfloat16", 64, None)
    assert not lists_documents("float32", 256, None)


def test_layers_are_not_fused_on_gpus_where_that_was_not_tried() -> None:
    config = parse(compose(["recipe=yxanul_197m_h100", "precision=fp8_hybrid"]))
    settings = config.model, config.precision, config.parallel
    assert why_not_fused(*settings, HOPPER) is None and why_not_fused(*settings, ADA) is None
    assert "compute capability 10.0" in why_not_fused(*settings, BLACKWELL)
