"""The model's tensors as blocks of global ones: the view that initialization and checkpoints share."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """All `ShardedTensor`s in a nested sharded state dict; factories (the two halves of SwiGLU) are taken apart first."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors(value.build())


def block_shape(shard: ShardedTensor) -> tuple[int, ...]:
    """Local shape with the axes that Megatron prepends (the layer number) as size 1."""
    return (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def row_blocks(
    described: ShardedTensor | ShardedTensorFactory, first_row: int, rows: Tensor, prefix: str, is_shared: bool
) -> Iterator[ShardedTensor]:
    """`rows` as blocks of the global tensor `<prefix>.<key of the parameter>`.

    Args:
        described: what Megatron-core says of the whole parameter of this rank.
        first_row: the parameter's row that the first of `rows` belongs to.
        is_shared: whether other data-parallel ranks hold the other rows, and not the same ones.
    """
    param = described.data
    width = math.prod(param.shape[1:])
    for shard in sharded_tensors({"": described}):
        begin = (shard.data.storage_offset() - param.storage_offset()) // width
        first, end = max(begin, first_row), min(begin + shard.local_shape[0], first_row + len(rows))
        if first >= end:
            continue
        block = rows[first - first_row : end - first_row]
        offset = list(shard.global_offset)
        offset[shard.prepend_axis_num] += first - begin
        yield dataclasses.replace(
            shard,
            key=f"{prefix}.{shard.key}",
            data=block,
            dtype=block.dtype,
            local_shape=tuple(block.shape),
            global_offset=tuple(offset),
            # Of equal blocks; these need not be.
            axis_fragmentations=None,
            # Megatron-core's last number counts data-parallel ranks, those that share a window included.
            replica_id=(*shard.replica_id[:-1], 0) if is_shared else shard.replica_id,
        )
