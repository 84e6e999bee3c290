"""Tensors of a checkpoint: each rank writes the pieces it owns as safetensors, and any layout reads the pieces it needs.

A piece is a block of a global tensor, named `<key>@<offset>`; which block it is stands in the file's header. Megatron-core's
sharding descriptions (`ShardedTensor`: key, global shape, offset) say what a rank owns, so tensor- and data-parallel sizes may
change between save and load. Nothing is pickled (Megatron's torch_dist format keeps its metadata in a pickle).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from yxanul_nemo.checkpoint.snapshot import HEADER_KEY, HostSnapshot
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger
from yxanul_nemo.model.sharding import block_shape, sharded_tensors
from yxanul_nemo.stored import Stored
from yxanul_nemo.unpacking.safe_weights import open_safetensors

DISPENSABLE = ("fp8.attention.", "guard.", "rng.")
"""Beginnings of the names of state that a run can begin anew where its checkpoint has none, because it is new to the run: scales
of attention in FP8 after windows too short for it, the history of a guard that was off, random states of another layout."""


class _Place(Stored):
    offset: list[Annotated[int, Field(ge=0)]]
    global_shape: list[Annotated[int, Field(ge=0)]]


_HEADER = TypeAdapter(dict[str, _Place])


@dataclass(frozen=True)
class Piece:
    """A block of a global tensor inside one file."""

    file: Path
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]


def save_shards(state: Any, folder: Path, rank: int) -> None:
    """Write the pieces that this rank owns; see `HostSnapshot`."""
    snapshot = HostSnapshot(state)
    snapshot.take(state)
    snapshot.write(folder, rank)


class ShardReader:
    """The pieces of a checkpoint's folder, read by memory map.

    Raises:
        UserError: a file is no safetensors file of this format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pieces: dict[str, list[Piece]] = {}
        self._open: dict[Path, Any] = {}
        for file in sorted(folder.glob("rank_*.safetensors")):
            try:
                handle = open_safetensors(file)
                header = _HEADER.validate_json((handle.metadata() or {})[HEADER_KEY])
                for name, place in header.items():
                    shape = tuple(handle.get_slice(name).get_shape())
                    piece = Piece(file, name, tuple(place.offset), shape, tuple(place.global_shape))
                    _check_inside(piece)
                    blocks = self.pieces.setdefault(name.rpartition("@")[0], [])
                    if any(other.offset == piece.offset for other in blocks):
                        raise ValueError(f"{piece.name} is there twice")
                    blocks.append(piece)
            except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
                first_line = str(error).partition("\n")[0]
                raise UserError(file, f"is not a checkpoint file ({type(error).__name__}: {first_line})") from None
            self._open[file] = handle
        if not self.pieces:
            raise UserError(folder, "holds no rank_*.safetensors", "a checkpoint")

    def keys(self) -> set[str]:
        """Names of the global tensors."""
        return set(self.pieces)

    def values(self, prefix: str) -> int:
        """Numbers that the files hold of the tensors whose names begin with `prefix`."""
        found = (piece for key, pieces in self.pieces.items() if key.startswith(prefix) for piece in pieces)
        return sum(math.prod(piece.shape) for piece in found)

    @torch.no_grad()
    def load_into(self, state: Any) -> None:
        """Fill every `ShardedTensor` of `state` in place; those that are `DISPENSABLE` and not here stay as they are.

        Raises:
            UserError: a tensor is missing, has another global shape or is not covered; it is named.
        """
        absent = []
        for shard in sharded_tensors(state):
            pieces = self.pieces.get(shard.key)
            if pieces is None and shard.key.startswith(DISPENSABLE):
                absent.append(shard.key)
                continue
            if pieces is None:
                raise UserError(self.folder, f"lacks the tensor '{shard.key}'", "a checkpoint of this model")
            for piece in pieces:
                if piece.global_shape != tuple(shard.global_shape):
                    raise UserError(
                        self.folder,
                        f"has '{shard.key}' as {list(piece.global_shape)}",
                        f"{list(shard.global_shape)}, as the configured model has it",
                    )
            self._fill(shard, pieces)
        if absent:
            logger.info("%s lacks %s (%d such tensors), which begin anew", self.folder.name, absent[0], len(absent))

    def _fill(self, shard: ShardedTensor, pieces: list[Piece]) -> None:
        target = shard.data.detach().view(block_shape(shard))
        covered = 0
        for piece in pieces:
            ours, theirs, count = [], [], 1
            for want_from, want_size, have_from, have_size in zip(
                shard.global_offset, target.shape, piece.offset, piece.shape, strict=True
            ):
                begin = max(want_from, have_from)
                end = min(want_from + want_size, have_from + have_size)
                ours.append(slice(begin - want_from, end - want_from))
                theirs.append(slice(begin - have_from, end - have_from))
                count *= max(0, end - begin)
            if count:
                data = self._data(piece, tuple(theirs), whole=count == math.prod(piece.shape))
                if data.is_floating_point() != target.is_floating_point():
                    raise UserError(piece.file, f"has '{piece.name}' as {data.dtype}", f"{target.dtype}")
                target[tuple(ours)].copy_(data)
                covered += count
        if covered != target.numel():
            raise UserError(
                self.folder,
                f"has {covered:,} of the {target.numel():,} values of '{shard.key}' that this rank needs",
                "all of them",
                "A rank's file is missing.",
            )

    def _data(self, piece: Piece, part: tuple[slice, ...], whole: bool) -> Tensor:
        """A whole tensor comes as a view of the mapped file, a part of one as a copy."""
        handle = self._open[piece.file]
        try:
            return handle.get_tensor(piece.name) if whole else handle.get_slice(piece.name)[part]
        except (SafetensorError, OSError) as error:
            raise UserError(piece.file, f"'{piece.name}' cannot be read ({error})") from None


def _check_inside(piece: Piece) -> None:
    dimensions = {len(piece.offset), len(piece.shape), len(piece.global_shape)}
    if len(dimensions) > 1 or any(
        begin + size > whole for begin, size, whole in zip(piece.offset, piece.shape, piece.global_shape, strict=True)
    ):
        raise ValueError(f"{piece.name} lies outside of its tensor {list(piece.global_shape)}")
