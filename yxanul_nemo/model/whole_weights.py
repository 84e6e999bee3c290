"""The weights of a whole model by name, as exports hold them, and the way from them into any layout of ranks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.errors import UserError

if TYPE_CHECKING:
    from yxanul_nemo.model.gpt import YxanulGPT


def weight_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the whole model, as Megatron-core's plain torch layers name them."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query_size, kv_size = model.num_attention_heads * model.head_dim, model.kv_groups * model.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (query_size + 2 * kv_size, hidden),
        "self_attention.linear_proj.weight": (hidden, query_size),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (model.padded_vocab_size(vocab_size), model.embedding_rank),
        "embedding.projection.weight": (hidden, model.embedding_rank),
        "decoder.final_layernorm.weight": (hidden,),
    }
    for i in range(model.num_layers):
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def require_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Refuse weights that are not exactly those of `shapes`; UserError names what is missing, unknown or misshapen."""
    problems = [f"lacks '{name}'" for name in shapes if name not in weights]
    problems += [f"has the unknown '{name}'" for name in weights if name not in shapes]
    problems += [
        f"has '{name}' as {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(where, "; ".join(problems[:3]) + more, "the weights of the configured model")


@torch.no_grad()
def load_whole_weights(model: "YxanulGPT", weights: Mapping[str, Tensor], where: object) -> None:
    """Copy whole weights (by Megatron-core's names for plain torch layers) into the blocks of them that this rank holds.

    Raises:
        UserError: names what is missing, unknown or misshapen.
    """
    from yxanul_nemo.model.sharding import block_shape, sharded_tensors

    require_weights(weights, weight_shapes(model.model_shape, model.real_vocab_size), where)
    for name, described in model.sharded_state_dict().items():
        for shard in sharded_tensors({name: described}):
            offset = shard.global_offset[shard.prepend_axis_num :]
            size = block_shape(shard)[shard.prepend_axis_num :]
            shard.data.copy_(weights[name][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))])
