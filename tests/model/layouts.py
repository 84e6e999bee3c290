"""A few training steps of a small model in a given layout, from a fresh start or from another layout's shards."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open

from yxanul_nemo.checkpoint.shards import ShardReader, save_shards
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import MuonConfig, OptimConfig, ParallelConfig, PrecisionConfig
from yxanul_nemo.model.build import build_model
from yxanul_nemo.training.cpu_backend import CpuBackend

SHAPE = ModelConfig(
    name="t", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, kv_groups=2, head_dim=16,
    embedding_rank=16, max_position_embeddings=64,
)  # fmt: skip
VOCAB, WINDOWS, SEQ_LEN, STEPS = 301, 8, 16, 3
GRAD_CLIP = 0.05
"""Low enough that every step is clipped, so that the norm over ranks matters."""


def train(
    muon: bool, options: dict[str, object], load_from: Path | None, save_to: Path | None
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step with `options` of ParallelConfig; resumed runs begin at step STEPS."""
    parallel = ParallelConfig(device="cpu", layer_spec="torch", **options)
    model = build_model(SHAPE, VOCAB, PrecisionConfig(name="fp32"), parallel, seed=5)
    backend = CpuBackend(model, OptimConfig(lr=1e-2, muon=MuonConfig() if muon else None), parallel)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if load_from is not None:
        ShardReader(load_from).load_into(backend.sharded_state())
        backend.after_load()
    record = []
    first = STEPS if load_from is not None else 0
    for step in range(first, first + STEPS):
        x = torch.randint(0, VOCAB, (WINDOWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))
        mine = x.view(2, ranks, WINDOWS // 2 // ranks, SEQ_LEN + 1)[:, rank]
        result = backend.train_step(
            mine[..., :-1].contiguous(), mine[..., 1:].contiguous(), lr=1e-2, grad_clip=GRAD_CLIP
        )
        record.append((float(result.loss), float(result.grad_norm)))
    if save_to is not None:
        save_to.mkdir(exist_ok=True)
        dist.barrier()
        save_shards(backend.sharded_state(), save_to, dist.get_rank())
    return record


def whole_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Of a checkpoint, by name; every value is written once."""
    tensors = {}
    for key, pieces in ShardReader(folder).pieces.items():
        whole, written = np.zeros(pieces[0].global_shape), np.zeros(pieces[0].global_shape, dtype=int)
        for piece in pieces:
            here = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            with safe_open(piece.file, framework="np") as handle:
                whole[here] = handle.get_tensor(piece.name)
            written[here] += 1
        assert (written == 1).all(), key
        tensors[key] = whole
    return tensors


def logits_and_gradients(tensor_parallel: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V] without labels, and the gradient of their weighted sum with respect to the (replicated) projection's weight."""
    parallel = ParallelConfig(device="cpu", layer_spec="torch", tensor_parallel=tensor_parallel)
    model = build_model(SHAPE, VOCAB, PrecisionConfig(name="fp32"), parallel, seed=5)
    generator = torch.Generator().manual_seed(0)
    logits_BTV = model(torch.randint(0, VOCAB, (2, SEQ_LEN), generator=generator))
    (logits_BTV * torch.randn(logits_BTV.shape, generator=generator)).sum().backward()
    return logits_BTV.detach().numpy(), model.embedding.projection.weight.grad.numpy()
