"""Weights between Megatron-core's names and shapes and those of a Llama, both ways.

A Llama has one [vocabulary, hidden] table; the factorized pair becomes W = E P^T, which serves the tied head exactly as well:
(h P) E^T = h (E P^T)^T.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.errors import UserError

TABLE, PROJECTION = "embedding.word_embeddings.weight", "embedding.projection.weight"
FOLDED = "model.embed_tokens.weight"
FACTORS = {"model.embed_tokens.table.weight": TABLE, "model.embed_tokens.projection.weight": PROJECTION}
"""Llama-shaped name -> ours, where the pair is kept (`modeling_yxanul.py`)."""
LLAMA_NAMES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""Key of ModelConfig -> key of a Llama's config.json."""
MAX_RANK_ERROR = 1e-5
"""Largest relative Frobenius error with which a table may stand for a pair; FP32 rounding of E P^T gives about 1e-7."""
ROWS_AT_ONCE = 16384


def llama_config(model: ModelConfig, vocab_size: int, eos_id: int, pad_id: int | None, dtype: str) -> dict[str, Any]:
    """`config.json` of transformers' LlamaForCausalLM for this model.

    Args:
        pad_id: an id for padding alone, whose embedding transformers then never trains; None if there is none.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        **{theirs: getattr(model, ours) for ours, theirs in LLAMA_NAMES.items()},
        "hidden_act": "silu",
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": dtype,
        "use_cache": True,
    }


def factorized_config(llama: Mapping[str, object], rank: int) -> dict[str, Any]:
    """`config.json` for `modeling_yxanul.py`, from that of the standard Llama."""
    changed = {
        "architectures": ["YxanulForCausalLM"],
        "model_type": "yxanul",
        "auto_map": {
            "AutoConfig": "modeling_yxanul.YxanulConfig",
            "AutoModelForCausalLM": "modeling_yxanul.YxanulForCausalLM",
        },
        "embedding_rank": rank,
        # The two ends share their matrices by construction; transformers has nothing to tie.
        "tie_word_embeddings": False,
    }
    return dict(llama) | changed


def to_llama(
    state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int, factorized: bool = False
) -> dict[str, Tensor]:
    """The state dict of a YxanulGPT with plain torch layers, on one rank, under a Llama's names; padded vocabulary rows are cut.

    The fold is computed in FP64 and rounded once to the type of the weights.

    Args:
        factorized: keep the pair of matrices instead, under the names of `FACTORS`.
    """
    table, projection = state[TABLE][:vocab_size], state[PROJECTION]
    if factorized:
        out = {theirs: {TABLE: table, PROJECTION: projection}[ours] for theirs, ours in FACTORS.items()}
    else:
        out = {FOLDED: _product(table, projection)}
    out["model.norm.weight"] = state["decoder.final_layernorm.weight"]
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        query, key, value = split_qkv(state[f"{ours}self_attention.linear_qkv.weight"], model)
        gate, up = state[f"{ours}mlp.linear_fc1.weight"].chunk(2, dim=0)
        out |= {
            f"{theirs}self_attn.q_proj.weight": query,
            f"{theirs}self_attn.k_proj.weight": key,
            f"{theirs}self_attn.v_proj.weight": value,
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
        }
        out |= {theirs + their_name: state[ours + our_name] for their_name, our_name in PLAIN_NAMES.items()}
    return {name: tensor.detach().contiguous().clone() for name, tensor in out.items()}


PLAIN_NAMES = {
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
}
"""Weights of a layer that are the same matrix in both: a Llama's name -> ours."""


def from_llama(weights: Mapping[str, Tensor], model: ModelConfig, vocab_size: int, where: object) -> dict[str, Tensor]:
    """The inverse of `to_llama`, in FP32: weights under Megatron-core's names, vocabulary rows padded with zeros.

    A single table is taken apart into a balanced pair (each factor gets the square root of the singular values), which is the
    trained pair up to an invertible matrix between the two; this needs a table that is a product of rank `embedding_rank`.

    Args:
        weights: a Llama's, with one table or the pair.
        where: how to name their file in messages.

    Raises:
        UserError: names a weight that is missing, unknown or misshapen; or the table has a higher rank.
    """
    left = {name: weight.float() for name, weight in weights.items()}

    def take(name: str, *shape: int) -> Tensor:
        if name not in left:
            raise UserError(where, f"lacks '{name}'", "the weights that its config.json describes")
        weight = left.pop(name)
        if tuple(weight.shape) != shape:
            raise UserError(where, f"has '{name}' as {list(weight.shape)}", f"{list(shape)}")
        return weight

    hidden, ffn, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads
    if FOLDED in left:
        table, projection = low_rank_pair(take(FOLDED, vocab_size, hidden), model.embedding_rank, where)
    else:
        table_name, projection_name = FACTORS
        table = take(table_name, vocab_size, model.embedding_rank)
        projection = take(projection_name, hidden, model.embedding_rank)
    padding = table.new_zeros(model.padded_vocab_size(vocab_size) - vocab_size, model.embedding_rank)
    out = {TABLE: torch.cat([table, padding]), PROJECTION: projection}
    out["decoder.final_layernorm.weight"] = take("model.norm.weight", hidden)
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        query = take(f"{theirs}self_attn.q_proj.weight", heads * model.head_dim, hidden)
        key, value = (
            take(f"{theirs}self_attn.{part}_proj.weight", model.kv_groups * model.head_dim, hidden) for part in "kv"
        )
        gate, up = (take(f"{theirs}mlp.{part}_proj.weight", ffn, hidden) for part in ("gate", "up"))
        out |= {
            f"{ours}self_attention.linear_qkv.weight": merge_qkv(query, key, value, model),
            f"{ours}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{ours}self_attention.linear_proj.weight": take(
                f"{theirs}self_attn.o_proj.weight", hidden, heads * model.head_dim
            ),
            f"{ours}mlp.linear_fc2.weight": take(f"{theirs}mlp.down_proj.weight", hidden, ffn),
            f"{ours}input_layernorm.weight": take(f"{theirs}input_layernorm.weight", hidden),
            f"{ours}pre_mlp_layernorm.weight": take(f"{theirs}post_attention_layernorm.weight", hidden),
        }
    if left:
        raise UserError(where, f"has the unknown '{min(left)}'", "the weights that its config.json describes")
    return out


def low_rank_pair(folded: Tensor, rank: int, where: object) -> tuple[Tensor, Tensor]:
    """E [vocabulary, rank] and P [hidden, rank] with E P^T = `folded` [vocabulary, hidden], in FP32.

    The right singular vectors come from the eigenvectors of W^T W in FP64, as W is tall: its condition is squared, which leaves
    half of FP64's 16 digits.

    Raises:
        UserError: the product differs from the table by more than MAX_RANK_ERROR.
    """
    gram = torch.zeros(folded.size(1), folded.size(1), dtype=torch.float64)
    for rows in folded.split(ROWS_AT_ONCE):
        gram += rows.double().T @ rows.double()
    squares, vectors = torch.linalg.eigh(gram)
    # Ascending order: the largest are last.
    vectors, roots = vectors[:, -rank:], squares[-rank:].clamp(min=0).pow(0.25)
    inverse = torch.where(roots > 0, 1 / roots, torch.zeros_like(roots))
    table = torch.cat([(rows.double() @ vectors * inverse).float() for rows in folded.split(ROWS_AT_ONCE)])
    projection = (vectors * roots).float()
    off = (_product(table, projection).double() - folded.double()).norm().item()
    relative = off / max(folded.double().norm().item(), torch.finfo(torch.float64).tiny)
    if not relative <= MAX_RANK_ERROR:
        raise UserError(
            where,
            f"its embedding is no product of rank {rank}: the nearest one differs by {relative:.1e} of its norm",
            f"at most {MAX_RANK_ERROR:g}",
            "Only a folder in float32 that was exported from such a model can be taken apart; one rounded to bfloat16 cannot. "
            "Import its .nemo file, or export with export.factorized=true.",
        )
    return table, projection


def split_qkv(weight: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron keeps, per key/value group, its query heads, then its key, then its value; a Llama keeps three matrices."""
    per_group = model.num_attention_heads // model.kv_groups
    grouped = weight.view(model.kv_groups, per_group + 2, model.head_dim, model.hidden_size)
    query, key, value = grouped.split([per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, model.hidden_size) for part in (query, key, value))


def merge_qkv(query: Tensor, key: Tensor, value: Tensor, model: ModelConfig) -> Tensor:
    """The inverse of `split_qkv`."""
    parts = [part.view(model.kv_groups, -1, model.head_dim, model.hidden_size) for part in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(-1, model.hidden_size)


def _product(table: Tensor, projection: Tensor) -> Tensor:
    """E P^T [vocabulary, hidden], computed in FP64 and rounded to the type of E."""
    right = projection.double().T
    return torch.cat([(rows.double() @ right).to(table.dtype) for rows in table.split(ROWS_AT_ONCE)])
