"""Which models' layers are fused."""

import pytest

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.model.fused_layers import WIDEST_HIDDEN_SIZE, why_not_fused


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
