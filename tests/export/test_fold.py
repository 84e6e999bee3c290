"""The fold into a Llama against transformers' Llama, and back."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.plain_gpt import PlainGPT
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.fold import FOLDED, from_llama, llama_config, low_rank_pair, merge_qkv, split_qkv, to_llama
from yxanul_nemo.export.llama import build_llama
from yxanul_nemo.model.build import build_model, reference_precision
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.model.whole_weights import weight_shapes

VOCAB = 301
SHAPES = {
    "three_queries_per_key": {"num_attention_heads": 6, "kv_groups": 2, "head_dim": 10, "hidden_size": 54},
    "five_queries_on_one_key": {"num_attention_heads": 5, "kv_groups": 1, "head_dim": 14, "hidden_size": 45},
    "own_keys_wider_than_the_model": {"num_attention_heads": 3, "kv_groups": 3, "head_dim": 32, "hidden_size": 42},
}


def shape_of(name: str) -> ModelConfig:
    return ModelConfig(
        name="t", num_layers=3, ffn_hidden_size=72, embedding_rank=24, max_position_embeddings=64, rope_base=500.0,
        norm_eps=1e-3, **SHAPES[name],
    )  # fmt: skip


def random_model(name: str) -> YxanulGPT:
    """Weights so large that any that is misplaced shows; padded rows of the table are larger still."""
    model = build_model(shape_of(name), VOCAB, *reference_precision(), seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() > 1 else 1.0))
        model.embedding.word_embeddings.weight[VOCAB:] = 1000.0
    return model.eval()


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> YxanulGPT:
    return random_model(request.param)


@torch.no_grad()
def test_the_fold_is_the_model_in_transformers_llama(model: YxanulGPT) -> None:
    shape = model.model_shape
    weights = to_llama(model.state_dict(), shape, VOCAB)
    assert weights[FOLDED].shape == (VOCAB, shape.hidden_size)
    llama = LlamaForCausalLM(
        LlamaConfig.from_dict(llama_config(shape, VOCAB, eos_id=3, pad_id=5, dtype="float32"))
    ).eval()
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), "the head is tied, and nothing else is left out"
    llama.tie_weights()
    logits = llama(ids()).logits
    assert logits.shape == (3, 40, VOCAB)
    # Two implementations of ours that share no code with transformers: Megatron-core's, and a plain one in FP64.
    plain = PlainGPT(shape, dict(model.named_parameters())).double()
    assert relative_error(logits, plain(ids(), VOCAB).float()) < 1e-5
    assert relative_error(logits, model(ids())) < 1e-5


@torch.no_grad()
def test_the_factorized_llama_is_the_model_too(model: YxanulGPT) -> None:
    shape = model.model_shape
    weights = to_llama(model.state_dict(), shape, VOCAB, factorized=True)
    config = llama_config(shape, VOCAB, 3, 5, "float32") | {
        "model_type": "yxanul",
        "embedding_rank": shape.embedding_rank,
    }
    llama = build_llama(weights, config | {"tie_word_embeddings": False})
    assert relative_error(llama(ids()).logits, model(ids())) < 1e-5
    assert sum(p.numel() for p in llama.parameters()) == sum(w.numel() for w in weights.values())


def test_the_table_is_the_exact_product_rounded_once(model: YxanulGPT) -> None:
    state = model.state_dict()
    table = state["embedding.word_embeddings.weight"][:VOCAB].double()
    exact = (table[:, None, :] * state["embedding.projection.weight"].double()[None]).sum(-1)
    folded = to_llama(state, model.model_shape, VOCAB)[FOLDED]
    assert ((folded - exact).abs() <= exact.abs() * 2**-24 + 1e-12).all()


def test_the_names_and_shapes_of_whole_weights_are_those_of_the_built_model(model: YxanulGPT) -> None:
    built = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert weight_shapes(model.model_shape, VOCAB) == built


def test_the_way_back_from_the_factors_is_exact(model: YxanulGPT) -> None:
    shape, state = model.model_shape, dict(model.named_parameters())
    back = from_llama(to_llama(state, shape, VOCAB, factorized=True), shape, VOCAB, "w")
    assert back.keys() == state.keys()
    for name, weight in state.items():
        kept = weight.detach().clone()
        if name == "embedding.word_embeddings.weight":
            kept[VOCAB:] = 0
        assert torch.equal(back[name], kept), name


@torch.no_grad()
def test_the_way_back_from_the_table_gives_the_same_logits(model: YxanulGPT) -> None:
    shape = model.model_shape
    folded = to_llama(model.state_dict(), shape, VOCAB)
    back = from_llama(folded, shape, VOCAB, "w")
    again = PlainGPT(shape, back)
    assert relative_error(again(ids(), VOCAB), model(ids())) < 1e-4
    table, projection = back["embedding.word_embeddings.weight"], back["embedding.projection.weight"]
    assert table[:VOCAB].norm().item() == pytest.approx(projection.norm().item(), rel=1e-4), "the pair is balanced"


@pytest.mark.parametrize("damage", ["rounded", "another"])
def test_a_table_that_is_no_product_is_refused(damage: str) -> None:
    model = random_model("three_queries_per_key")
    table = to_llama(model.state_dict(), model.model_shape, VOCAB)[FOLDED]
    table = table.bfloat16().float() if damage == "rounded" else torch.randn(table.shape)
    with pytest.raises(UserError, match=r"no product of rank 24: the nearest one differs by \d.*rounded to bfloat16"):
        low_rank_pair(table, 24, "model.safetensors")


def test_low_rank_pairs_of_lower_rank_and_of_zeros_come_back() -> None:
    low = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 20)
    for table in (low, torch.zeros(50, 20)):
        left, right = low_rank_pair(table, 8, "w")
        assert left.isfinite().all()
        torch.testing.assert_close(left @ right.T, table, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lacks 'model.layers.1.mlp.up_proj.weight'"),
        (lambda w: w.pop(FOLDED), "lacks 'model.embed_tokens.table.weight'"),
        (lambda w: w.update({"model.layers.9.extra": torch.zeros(1)}), "has the unknown 'model.layers.9.extra'"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"has 'model.norm.weight' as \[3\]; expected \[54\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message: str) -> None:
    model = random_model("three_queries_per_key")
    weights = to_llama(model.state_dict(), model.model_shape, VOCAB)
    change(weights)
    with pytest.raises(UserError, match=message):
        from_llama(weights, model.model_shape, VOCAB, "model.safetensors")


def test_query_key_and_value_are_parted_and_joined_exactly() -> None:
    shape = shape_of("three_queries_per_key")
    weight = torch.arange((6 + 4) * 10 * 54).float().view(100, 54)
    parts = split_qkv(weight, shape)
    assert [part.shape[0] for part in parts] == [60, 20, 20]
    assert torch.equal(merge_qkv(*parts, shape), weight)
