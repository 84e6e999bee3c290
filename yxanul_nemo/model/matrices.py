"""The layers' matrices: which parameters they are, and the matrices that each of them is made of.

Megatron-core keeps queries, keys and values in one parameter, by groups of heads, and gate and up projection in another. To an optimizer
that looks at whole matrices they are matrices of their own.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Parameter

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.model.gpt import YxanulGPT


@dataclass(frozen=True)
class Pieces:
    """Some matrices of one shape in a parameter."""

    count: int
    rows: int
    """Of each of them."""


@dataclass(frozen=True)
class MatrixKind:
    """One parameter of each layer, all of one shape.

    Shapes and rows are those of this rank's part, where tensor-parallel ranks share a matrix.
    """

    name: str
    params: tuple[Parameter, ...]
    """In the order of the layers."""
    pieces: tuple[Pieces, ...]
    """What a parameter consists of once its rows are in `piece_order`."""
    split_dim: int
    """Dimension that tensor-parallel ranks share: 0 rows, 1 columns."""
    piece_order: tuple[int, ...] | None = None
    """For each row of the pieces, one after another, the parameter's row; None: the parameter has them in this order."""

    @cached_property
    def places(self) -> Tensor | None:
        """For each row of the parameter its place in `piece_order`, int32, on the parameters' device."""
        if self.piece_order is None:
            return None
        return torch.tensor(self.piece_order).argsort().to(self.params[0].device, torch.int32)


def layer_matrices(model: YxanulGPT) -> tuple[MatrixKind, ...]:
    """All of a model: attention's two projections and the feed-forward block's two."""
    shape, ranks = model.model_shape, model.config.tensor_model_parallel_size
    layers = model.decoder.layers
    groups, per_group = shape.kv_groups // ranks, shape.num_attention_heads // shape.kv_groups
    key_rows = groups * shape.head_dim
    proj = tuple(layer.self_attention.linear_proj.weight for layer in layers)
    fc2 = tuple(layer.mlp.linear_fc2.weight for layer in layers)
    return (
        MatrixKind(
            "qkv",
            tuple(layer.self_attention.linear_qkv.weight for layer in layers),
            (Pieces(1, per_group * key_rows), Pieces(2, key_rows)),
            split_dim=0,
            piece_order=_qkv_order(shape, groups),
        ),
        MatrixKind("proj", proj, (Pieces(1, proj[0].size(0)),), split_dim=1),
        MatrixKind(
            "fc1",
            tuple(layer.mlp.linear_fc1.weight for layer in layers),
            (Pieces(2, shape.ffn_hidden_size // ranks),),
            split_dim=0,
        ),
        MatrixKind("fc2", fc2, (Pieces(1, fc2[0].size(0)),), split_dim=1),
    )


def _qkv_order(shape: ModelConfig, groups: int) -> tuple[int, ...]:
    """Rows of all queries, all keys, all values: Megatron-core has for each group its queries' heads, its key and its value."""
    per_group = shape.num_attention_heads // shape.kv_groups
    rows = torch.arange(groups * (per_group + 2) * shape.head_dim).view(groups, per_group + 2, shape.head_dim)
    parts = rows[:, :per_group], rows[:, per_group], rows[:, per_group + 1]
    return tuple(torch.cat([part.reshape(-1) for part in parts]).tolist())
