"""Weights between Megatron-core's names and shapes and those of a standard Llama.

A Llama has one [vocabulary, hidden] table; the factorized pair becomes W = E P^T, which serves the tied head exactly as well:
(h P) E^T = h (E P^T)^T.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from yxanul_nemo.config.model import ModelConfig


def llama_config(model: ModelConfig, vocab_size: int, eos_id: int, pad_id: int, dtype: str) -> dict:
    """`config.json` of transformers' LlamaForCausalLM for this model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
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


def to_llama(state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """The state dict of a YxanulGPT with plain torch layers, on one rank, under a Llama's names; padded vocabulary rows are cut.

    The fold is computed in FP64 and rounded once to the type of the weights.
    """
    table = state["embedding.word_embeddings.weight"][:vocab_size]
    projection = state["embedding.projection.weight"]
    folded = torch.empty(vocab_size, model.hidden_size, dtype=table.dtype)
    for rows in torch.arange(vocab_size).split(16384):
        folded[rows] = (table[rows].double() @ projection.double().T).to(table.dtype)
    out = {"model.embed_tokens.weight": folded, "model.norm.weight": state["decoder.final_layernorm.weight"]}
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        query, key, value = split_qkv(state[f"{ours}self_attention.linear_qkv.weight"], model)
        gate, up = state[f"{ours}mlp.linear_fc1.weight"].chunk(2, dim=0)
        out |= {
            f"{theirs}self_attn.q_proj.weight": query,
            f"{theirs}self_attn.k_proj.weight": key,
            f"{theirs}self_attn.v_proj.weight": value,
            f"{theirs}self_attn.o_proj.weight": state[f"{ours}self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": state[f"{ours}mlp.linear_fc2.weight"],
            f"{theirs}input_layernorm.weight": state[f"{ours}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": state[f"{ours}pre_mlp_layernorm.weight"],
        }
    return {name: tensor.detach().contiguous().clone() for name, tensor in out.items()}


def split_qkv(weight: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron keeps, per key/value group, its query heads, then its key, then its value; a Llama keeps three matrices."""
    per_group = model.num_attention_heads // model.kv_groups
    grouped = weight.view(model.kv_groups, per_group + 2, model.head_dim, model.hidden_size)
    query, key, value = grouped.split([per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, model.hidden_size) for part in (query, key, value))
