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

from yxanul_nemo.log import logger
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
        state: nested dict of `ShardedTensor`s, as it will be saved.
    """

    def __init__(self, state: Any):
        self._allocate(list(_owned(state)))

    @property
    def size_bytes(self) -> int:
        """Host memory that is held."""
        return sum(part.size_bytes for part in self._parts)

    @torch.no_grad()
    def take(self, state: Any) -> None:
        """Copy the tensors as they are now; when it returns, they may change."""
        pieces = list(_owned(state))
        if [_form(name, tensor) for name, tensor, _ in pieces] != self._forms:
            logger.info("the state's tensors are others than before; memory for saves is allocated anew")
            self._allocate(pieces)
        for name, tensor, _ in pieces:
            self._targets[name].copy_(tensor, non_blocking=True)
        if self._on_gpu:
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

    def _allocate(self, pieces: list[tuple[str, Tensor, ShardedTensor]]) -> None:
        self._forms = [_form(name, tensor) for name, tensor, _ in pieces]
        self._on_gpu = any(tensor.is_cuda for _, tensor, _ in pieces)
        self._parts: list[_Part] = []
        self._targets: dict[str, Tensor] = {}
        places: list[tuple[_Part, int]] = []
        for _, tensor, _ in pieces:
            padded = -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if not self._parts or self._parts[-1].size_bytes + padded > PART_BYTES:
                self._parts.append(_Part())
            places.append((self._parts[-1], self._parts[-1].size_bytes))
            self._parts[-1].size_bytes += padded
        buffers = {id(part): _host_memory(part.size_bytes, pinned=self._on_gpu) for part in self._parts}
        for (name, tensor, shard), (part, begin) in zip(pieces, places, strict=True):
            assert name not in self._targets, f"two pieces are called {name}"
            view = buffers[id(part)][begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            part.tensors[name] = self._targets[name] = view
            part.header[name] = {"offset": list(shard.global_offset), "global_shape": list(shard.global_shape)}


def _host_memory(size_bytes: int, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            logger.warning("no pinned memory for saves, which will take training longer: %s", first_line)
    return torch.empty(size_bytes, dtype=torch.uint8)


def _form(name: str, tensor: Tensor) -> tuple[str, torch.Size, torch.dtype]:
    return name, tensor.shape, tensor.dtype


def _owned(state: Any) -> Iterator[tuple[str, Tensor, ShardedTensor]]:
    """Name, data and description of each piece that this rank is to write."""
    for shard in sharded_tensors(state):
        if is_main_replica(shard.replica_id):
            name = f"{shard.key}@{','.join(map(str, shard.global_offset))}"
            yield name, shard.data.detach().reshape(block_shape(shard)), shard
