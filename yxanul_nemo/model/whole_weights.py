"""The weights of a whole model by name, as exports hold them, and the way from them into any layout of ranks."""

from collections.abc import Iterator, Mapping, Sequence
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
    """Refuse weights that are not exactly those of `shapes`, or are no finite numbers.

    Raises:
        UserError: names what is missing, unknown, misshapen, of another type, or how many values of it are NaN or infinite.
    """
    require_shapes({name: tuple(weight.shape) for name, weight in weights.items()}, shapes, where)
    require_finite(weights, where)


def require_finite(weights: Mapping[str, Tensor], where: object) -> None:
    """Refuse weights of another type, NaN or infinite; UserError names each with the number of such values."""
    _raise_first([*_not_finite(weights)], where, "finite floating-point numbers")


def require_shapes(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """`require_weights` for what the header of a file says, before its weights are read."""
    problems = [f"lacks '{name}'" for name in shapes if name not in found]
    problems += [f"has the unknown '{name}'" for name in found if name not in shapes]
    problems += [
        f"has '{name}' as {list(found[name])} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    _raise_first(problems, where, "the weights of the configured model")


def _not_finite(weights: Mapping[str, Tensor]) -> Iterator[str]:
    for name, weight in weights.items():
        if not weight.is_floating_point():
            yield f"has '{name}' as {weight.dtype}"
        # One pass without memory of its own; NaN comes through.
        elif weight.numel() and not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            wrong = weight.numel() - int(torch.isfinite(weight).sum())
            yield f"has {wrong:,} of {weight.numel():,} values of '{name}' that are NaN or infinite"


def _raise_first(problems: Sequence[str], where: object, expected: str) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(where, "; ".join(problems[:3]) + more, expected)


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
