"""Initial weights that depend on the seed and the tensor's name alone: equal on every device, layer spec and parallel layout."""

import hashlib
import math

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.model.sharding import block_shape, sharded_tensors

RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize(model: MegatronModule, shape: ModelConfig, seed: int) -> None:
    """N(0, init_std) for matrices, N(0, embedding_init_std) for the embedding's factors, ones for norms; projections into the
    residual stream get init_std / sqrt(2 layers) (GPT-2).

    Each global tensor is drawn on the CPU from a generator of its own, and every rank keeps its block.
    """
    drawn: tuple[str, Tensor] = ("", torch.empty(0))
    for shard in sharded_tensors(model.sharded_state_dict()):
        if shard.data.dim() < 2:
            shard.data.fill_(1.0)
            continue
        layer = shard.global_offset[: shard.prepend_axis_num]
        name = f"{shard.key}@{layer}"
        if drawn[0] != name:
            std = _std(shape, shard.key)
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            full_size = shard.global_shape[shard.prepend_axis_num :]
            drawn = (name, torch.empty(full_size).normal_(0.0, std, generator=generator))
        offset = shard.global_offset[shard.prepend_axis_num :]
        block = block_shape(shard)[shard.prepend_axis_num :]
        shard.data.copy_(drawn[1][tuple(slice(o, o + n) for o, n in zip(offset, block, strict=True))])


def _std(shape: ModelConfig, key: str) -> float:
    if key.startswith("embedding."):
        return shape.embedding_init_std
    return shape.init_std / (math.sqrt(2 * shape.num_layers) if key.endswith(RESIDUAL_PROJECTIONS) else 1.0)
