"""One rank's pieces of a checkpoint copied into host memory at one moment, to be written while training goes on.

The buffers are allocated once and used for every save: pinned where the tensors are on a GPU, so that a copy runs at the speed of
the bus. A rank's pieces are spread over files of about `PART_BYTES`, which are written, hashed and verified side by side.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from safetensors.torch import save_file
from torch import Tensor

from yxanul_nemo.model.sharding import block_shape, sharded_tensors

HEADER_KEY = "pieces"
"""Metadata of a file: name of a piece -> where it lies in its global tensor."""
PART_BYTES = 256 << 20
"""Pieces go into the next file when this would be exceeded. A power of two, because torch rounds pinned memory up to one."""
WRITE_THREADS = 4
ALIGNMENT_BYTES = 64


@dataclass
class _Part:
    """One file: its tensors are views of one buffer."""

    size_bytes: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    header: dict[str, dict[str, list[int]]] = field(default_factory=dict)


class HostSnapshot:
    """Buffers for the pieces that this rank owns (its main replicas).

    Args:
        state: nested dict of `ShardedTensor`s; later ones must have the same names, shapes and number formats.
    """

    def __init__(self, state: Any):
        pieces = list(_owned(state))
        self.on_gpu = any(tensor.is_cuda for _, tensor, _ in pieces)
        plan: list[list[tuple[str, Tensor, ShardedTensor, int]]] = []
        sizes: list[int] = []
        for name, tensor, shard in pieces:
            padded = -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if not plan or sizes[-1] + padded > PART_BYTES:
                plan.append([])
                sizes.append(0)
            plan[-1].append((name, tensor, shard, sizes[-1]))
            sizes[-1] += padded
        self._parts: list[_Part] = []
        self._targets: dict[str, Tensor] = {}
        for members, size_bytes in zip(plan, sizes, strict=True):
            buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self.on_gpu)
            part = _Part(size_bytes)
            for name, tensor, shard, begin in members:
                assert name not in self._targets, f"two pieces are called {name}"
                view = buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                part.tensors[name] = self._targets[name] = view
                part.header[name] = {"offset": list(shard.global_offset), "global_shape": list(shard.global_shape)}
            self._parts.append(part)

    @property
    def size_bytes(self) -> int:
        """Host memory that is held."""
        return sum(part.size_bytes for part in self._parts)

    @torch.no_grad()
    def take(self, state: Any) -> None:
        """Copy the tensors as they are now; when it returns, they may change."""
        taken = 0
        for name, tensor, _ in _owned(state):
            target = self._targets[name]
            assert (target.shape, target.dtype) == (tensor.shape, tensor.dtype), name
            target.copy_(tensor, non_blocking=True)
            taken += 1
        assert taken == len(self._targets), f"{taken} pieces instead of {len(self._targets)}"
        if self.on_gpu:
            # The copies are queued behind the step that has just ended, on the stream that trains.
            copied = torch.cuda.Event()
            copied.record()
            copied.synchronize()

    def write(self, folder: Path, rank: int) -> None:
        """Write what was taken last to `folder/rank_<rank>.safetensors`, `rank_<rank>.1.safetensors` and so on.

        Raises:
            OSError, safetensors.SafetensorError: disk full and the like.
        """

        def write_part(number: int, part: _Part) -> None:
            suffix = f".{number}" if number else ""
            # It releases the interpreter lock and reads the buffers in place (safetensors 0.8).
            save_file(
                part.tensors,
                folder / f"rank_{rank:05d}{suffix}.safetensors",
                metadata={HEADER_KEY: json.dumps(part.header)},
            )

        with ThreadPoolExecutor(WRITE_THREADS) as pool:
            list(pool.map(write_part, range(len(self._parts)), self._parts))


def _owned(state: Any) -> Iterator[tuple[str, Tensor, ShardedTensor]]:
    """Name, data and description of each piece that this rank is to write."""
    for shard in sharded_tensors(state):
        if is_main_replica(shard.replica_id):
            name = f"{shard.key}@{','.join(map(str, shard.global_offset))}"
            yield name, shard.data.detach().reshape(block_shape(shard)), shard
