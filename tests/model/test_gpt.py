"""The model against a plain reference, and what must hold for any GPT."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.model.plain_gpt import PlainGPT
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.model.build import build_model, reference_precision
from yxanul_nemo.model.counts import parameter_count, training_flops_per_token
from yxanul_nemo.model.gpt import YxanulGPT

VOCAB = 301
SHAPES = {
    "grouped": {"num_attention_heads": 6, "kv_groups": 2, "head_dim": 16, "hidden_size": 96},
    "all_own_keys": {"num_attention_heads": 4, "kv_groups": 4, "head_dim": 16, "hidden_size": 64},
    "one_key": {"num_attention_heads": 4, "kv_groups": 1, "head_dim": 32, "hidden_size": 48},
}


def make(shape: str = "grouped", seed: int = 3, std: float = 0.2) -> YxanulGPT:
    """A small model with weights large enough that every part of it matters."""
    config = ModelConfig(
        name="t",
        num_layers=3,
        ffn_hidden_size=128,
        embedding_rank=24,
        max_position_embeddings=64,
        init_std=std,
        **SHAPES[shape],
    )
    model = build_model(config, VOCAB, *reference_precision(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name:
                weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model() -> YxanulGPT:
    return make()


def ids(batch: int = 3, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(model: YxanulGPT) -> PlainGPT:
    return PlainGPT(model.model_shape, dict(model.named_parameters()))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_the_plain_reference(shape: str) -> None:
    model = make(shape)
    reference = plain(model)
    x_BT, y_BT = ids(), ids(seed=1)
    logits, expected = model(x_BT), reference(x_BT, VOCAB)
    assert logits.shape == expected.shape == (3, 20, VOCAB)
    assert (logits - expected).norm() / expected.norm() < 1e-5
    loss = model(x_BT, y_BT)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), y_BT.flatten(), reduction="none").view(3, 20)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    loss.mean().backward()
    expected_loss.mean().backward()
    for name, weight in model.named_parameters():
        other = reference.weight(name).grad
        assert (weight.grad - other).norm() / other.norm() < 1e-4, name


@pytest.mark.parametrize(
    ("name", "unpadded", "padded"),
    [
        ("yxanul_197m", 196_398_464, 196_406_016),
        ("yxanul_270m", 293_684_736, 293_692_288),
        ("yxanul_270m_slim", 145_281_280, None),
    ],
)
def test_parameter_counts_of_the_recipes(name: str, unpadded: int, padded: int | None) -> None:
    config = parse(compose([f"model={name}"])).model
    assert parameter_count(config, 200_005) == unpadded
    if padded is not None:
        assert config.padded_vocab_size(200_005) == 200_064
        assert parameter_count(config, 200_064) == padded


def test_the_197m_model_as_built_has_exactly_its_parameters() -> None:
    config = parse(compose(["model=yxanul_197m"])).model
    built = build_model(config, 200_005, *reference_precision(), seed=0)
    assert sum(p.numel() for p in built.parameters()) == 196_406_016
    for name, weight in built.named_parameters():
        if weight.dim() < 2:
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(56) if residual else 0.02, rel=0.02), name
    x_BT = torch.randint(0, 200_005, (1, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = built(x_BT[:, :-1], x_BT[:, 1:].contiguous()).mean().item()
    assert loss == pytest.approx(math.log(200_005), abs=0.1)


def test_flops_are_six_per_matrix_weight_plus_attention() -> None:
    config = parse(compose(["model=yxanul_197m"])).model
    matrices = parameter_count(config, 200_005) - 57 * 768 + 128 * 768
    assert training_flops_per_token(config, 200_005, 0) == 6 * matrices
    assert training_flops_per_token(config, 200_005, 2048) == pytest.approx(1.44e9, rel=0.01)


def test_changing_a_token_leaves_everything_before_it_bit_equal(model: YxanulGPT) -> None:
    x_BT = ids()
    before = model(x_BT)
    for t in (1, 7, 19):
        changed = x_BT.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_rows_of_a_batch_do_not_see_each_other(model: YxanulGPT) -> None:
    x_BT = ids()
    other = x_BT.clone()
    other[1:] = ids(seed=9)[1:]
    assert torch.equal(model(other)[0], model(x_BT)[0])


def test_only_relative_positions_matter(model: YxanulGPT) -> None:
    """The reference shifted by 17 positions gives the same logits, and the model's."""
    reference, x_BT = plain(model).double(), ids()
    shifted = reference(x_BT, VOCAB, first_position=17)
    assert (shifted - reference(x_BT, VOCAB)).abs().max() < 1e-9
    assert (shifted - model(x_BT)).abs().max() < 1e-3


def test_grouped_attention_is_full_attention_with_repeated_keys() -> None:
    grouped = make("grouped")
    s = grouped.model_shape
    full_shape = s.model_copy(update={"kv_groups": s.num_attention_heads})
    full = build_model(full_shape, VOCAB, *reference_precision(), seed=0)
    state = dict(grouped.named_parameters())
    per_group = s.num_attention_heads // s.kv_groups
    with torch.no_grad():
        for name, weight in full.named_parameters():
            if "linear_qkv" in name:
                w = state[name].view(s.kv_groups, per_group + 2, s.head_dim, s.hidden_size)
                rows = [
                    torch.stack((w[g, h], w[g, -2], w[g, -1])) for g in range(s.kv_groups) for h in range(per_group)
                ]
                weight.copy_(torch.stack(rows).view_as(weight))
            else:
                weight.copy_(state[name])
    x_BT = ids()
    torch.testing.assert_close(full(x_BT), grouped(x_BT), rtol=1e-4, atol=1e-4)


def test_the_head_sends_gradient_to_both_factors_and_none_to_padding() -> None:
    model = make()
    table, projection = model.embedding.word_embeddings.weight, model.embedding.projection.weight
    x_BT = torch.zeros(2, 8, dtype=torch.long)
    model(x_BT, ids(2, 8)).sum().backward()
    assert table.shape[0] == 384
    assert (table.grad[1:VOCAB].norm(dim=1) > 0).all(), (
        "tokens that were never an input get gradient only through the head"
    )
    assert torch.equal(table.grad[VOCAB:], torch.zeros_like(table.grad[VOCAB:]))
    assert projection.grad.norm() > 0


def test_padded_rows_never_get_probability() -> None:
    model = make()
    x_BT, y_BT = ids(), ids(seed=1)
    before = model(x_BT, y_BT)
    with torch.no_grad():
        model.embedding.word_embeddings.weight[VOCAB:] = 100.0
    assert torch.equal(model(x_BT, y_BT), before)
    assert model(x_BT).shape[-1] == VOCAB


def test_ignored_labels_have_no_loss_and_no_gradient(model: YxanulGPT) -> None:
    x_BT, y_BT = ids(), ids(seed=1)
    y_BT[:, 5:] = -100
    loss = model(x_BT, y_BT)
    assert torch.equal(loss[:, 5:], torch.zeros(3, 15))
    torch.testing.assert_close(loss[:, :5], model(x_BT[:, :5], y_BT[:, :5].contiguous()), rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_weights() -> None:
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    for (name, a), (_, b) in zip(one.named_parameters(), same.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.embedding.word_embeddings.weight, other.embedding.word_embeddings.weight)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"kv_groups": 5}, "not a multiple of kv_groups"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"embedding_rank": 200}, "over hidden_size"),
        ({"num_layers": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_shapes_are_refused_with_the_rule(change: dict[str, int], rule: str) -> None:
    good = {"name": "t", "num_layers": 1, "ffn_hidden_size": 128, "embedding_rank": 24, **SHAPES["grouped"]}
    with pytest.raises(ValidationError, match=rule):
        ModelConfig(**good | change)


@pytest.mark.parametrize("precision", ["bf16", "fp8_hybrid", "mxfp8"])
def test_precisions_that_a_cpu_lacks_are_refused_with_the_nearest(precision: str) -> None:
    from yxanul_nemo.errors import UserError

    with pytest.raises(UserError, match=r"precision\.name: is .* on a CPU; expected fp32"):
        build_model(make().model_shape, VOCAB, PrecisionConfig(name=precision), ParallelConfig(device="cpu"), seed=0)
