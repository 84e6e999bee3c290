"""The rules between sections: each is named with phase or key, the value and what it must be."""

import pytest

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.runtime import resolve_layer_spec

THREE = ["recipe=yxanul_197m_h100"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.hidden_size=776"], ["model.hidden_size=776", "multiple of 16", "fp8_hybrid"]),
        (["model.ffn_hidden_size=1708"], ["model.ffn_hidden_size=1708", "multiple of 16"]),
        (["model.head_dim=12", "model.kv_groups=1"], ["model.kv_groups x head_dim=1 x 12", "multiple of 16"]),
        (
            ["model.num_attention_heads=1", "model.kv_groups=1", "model.head_dim=88"],
            ["head_dim=1 x 88", "multiple of 16"],
        ),
        (
            ["model.ffn_hidden_size=2064", "parallel.tensor_parallel=2"],
            ["ffn_hidden_size=2064 / parallel.tensor_parallel=2"],
        ),
        (["model.ffn_hidden_size=2064", "precision=mxfp8"], ["model.ffn_hidden_size=2064", "multiple of 32", "mxfp8"]),
        (
            ["curriculum.phases.0.seq_len=4", "curriculum.phases.0.tokens_per_step=65540"],
            ["curriculum phase 1", "tokens_per_step=65540", "multiple of 16", "fp8_hybrid"],
        ),
        (["+curriculum.phases.1.blend.maths=1"], ["curriculum phase 2", "'maths'", "text, math, code"]),
        (["curriculum.phases.1.blend={text: 0, math: 0, code: 0}"], ["curriculum phase 2", "sum above 0"]),
        (["curriculum.phases.3.blend={text: 1, math: -0.5, code: 0}"], ["curriculum phase 4", "'math'", "-0.5"]),
        (["curriculum.phases.3.blend={text: 1, math: nan, code: 0}"], ["curriculum.phases.3.blend.math", "nan"]),
        (["curriculum.phases.3.blend={text: inf, math: 0, code: 0}"], ["curriculum.phases.3.blend.text", "inf"]),
        (["curriculum.phases.2.seq_len=8"], ["phase 3: seq_len=8", "must not fall"]),
        (["curriculum.total_tokens=inf"], ["curriculum.total_tokens", "finite"]),
        (["curriculum.phases.0.grad_clip=inf"], ["curriculum.phases.0.grad_clip", "finite"]),
        (["curriculum.phases.0.lr_scale=nan"], ["curriculum.phases.0.lr_scale"]),
        (["model.num_attention_heads=10", "precision=bf16"], ["hidden_size=768 is not a multiple", "heads=10"]),
        (["plan.price_per_gpu_hour=-1"], ["plan.price_per_gpu_hour"]),
    ],
)
def test_a_broken_rule_is_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(compose(THREE + overrides))
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.ffn_hidden_size=1708", "precision=bf16"],
        ["model.ffn_hidden_size=2080", "parallel.tensor_parallel=2"],
        ["curriculum.phases.1.blend={text: 1}"],
        ["curriculum.phases.1.blend={text: 3, math: 1, code: 0}"],
    ],
)
def test_what_keeps_the_rules_passes(overrides: list[str]) -> None:
    parse(compose(THREE + overrides))


@pytest.mark.parametrize("where", ["parallel.device=cpu", "parallel.layer_spec=torch"])
def test_a_window_is_shared_on_gpus_with_transformer_engine_only(where: str) -> None:
    with pytest.raises(UserError, match="context_parallel=2 with"):
        parse(compose([*THREE, "parallel.context_parallel=2", where]))


def test_without_transformer_engine_a_window_is_not_shared_where_it_is_found_to_be_missing() -> None:
    parallel = parse(compose([*THREE, "parallel.context_parallel=2"])).parallel
    with pytest.raises(UserError, match=r"parallel\.context_parallel: is 2"):
        resolve_layer_spec(parallel, "cpu")
