"""Initial weights that depend on the seed and the tensor's name alone: equal on every device, layer spec and parallel layout."""

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.model.sharding import block_shape, sharded_tensors

MAX_DRAWING_THREADS = 8
RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize(model: MegatronModule, shape: ModelConfig, seed: int) -> None:
    """N(0, init_std) for matrices, N(0, embedding_init_std) for the embedding's factors, ones for norms; projections into the
    residual stream get init_std / sqrt(2 layers) (GPT-2).

    Each global tensor is drawn on the CPU from a generator of its own, so several can be drawn side by side, and every rank keeps its
    block.
    """
    shards: dict[str, list[ShardedTensor]] = {}
    for shard in sharded_tensors(model.sharded_state_dict()):
        if shard.data.dim() < 2:
            shard.data.fill_(1.0)
        else:
            shards.setdefault(f"{shard.key}@{shard.global_offset[: shard.prepend_axis_num]}", []).append(shard)

    def draw(name: str) -> Tensor:
        first = shards[name][0]
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        full_size = first.global_shape[first.prepend_axis_num :]
        # It runs on one core and lets other threads run meanwhile.
        return torch.empty(full_size).normal_(0.0, _std(shape, first.key), generator=generator)

    threads = min(MAX_DRAWING_THREADS, torch.get_num_threads())
    with ThreadPoolExecutor(threads) as pool:
        # A few at a time, as together they are the whole model.
        for names in itertools.batched(shards, threads):
            for name, drawn in zip(names, pool.map(draw, names), strict=True):
                for shard in shards[name]:
                    offset = shard.global_offset[shard.prepend_axis_num :]
                    block = block_shape(shard)[shard.prepend_axis_num :]
                    shard.data.copy_(drawn[tuple(slice(o, o + n) for o, n in zip(offset, block, strict=True))])


def _std(shape: ModelConfig, key: str) -> float:
    if key.startswith("embedding."):
        return shape.embedding_init_std
    return shape.init_std / (math.sqrt(2 * shape.num_layers) if key.endswith(RESIDUAL_PROJECTIONS) else 1.0)
