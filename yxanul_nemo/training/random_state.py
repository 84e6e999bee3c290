"""The states of this process's random generators in a checkpoint, so that whatever draws from them goes on where it stood.

Nothing in the model draws today (no dropout; weights and data have generators of their own), but a change that does must not make
resumed runs differ from others. A rank that has no states in a checkpoint, of another number of ranks, keeps those of its seed.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch import Tensor


def sharded_random_state(device: str) -> dict[str, ShardedTensor]:
    """Copies of the states of torch's generators and, on a GPU, of Megatron-core's, each rank its own, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
        states |= {f"megatron.{name}": _state_of(generator) for name, generator in get_all_rng_states().items()}
    prefix = f"rng.rank_{dist.get_rank():05d}"
    return {
        f"{prefix}.{name}": ShardedTensor.from_rank_offsets(f"{prefix}.{name}", state.contiguous())
        for name, state in states.items()
    }


def restore_random_state(loaded: Mapping[str, Any], device: str) -> None:
    """Give the generators the states in a dict of `sharded_random_state`, whose tensors a checkpoint's have been copied into."""
    prefix = f"rng.rank_{dist.get_rank():05d}"
    torch.set_rng_state(loaded[f"{prefix}.cpu"].data)
    if device == "cuda":
        torch.cuda.set_rng_state(loaded[f"{prefix}.cuda"].data)
        for name, generator in get_all_rng_states().items():
            state = loaded[f"{prefix}.megatron.{name}"].data
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            else:
                generator.copy_(state)


def _state_of(generator: torch.Generator | Tensor) -> Tensor:
    """Megatron-core keeps generators where a CUDA graph may use them, and bare states otherwise."""
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.clone()
