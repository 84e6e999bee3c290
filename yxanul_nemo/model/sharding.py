"""The model's tensors as blocks of global ones: the view that initialization and checkpoints share."""

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


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
