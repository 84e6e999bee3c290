"""Ranks that act alike: what one of them is asked, finds or fails at is known to all, so that none waits for one that has left.

Every rank must make the same calls in the same order, within one group; None is the group of all ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from yxanul_nemo.errors import UserError


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    return any_rank_each(flag)[0]


def any_rank_each(*flags: bool) -> tuple[bool, ...]:
    """Of each flag whether it is set on any rank; the tensor is on the CPU, so no GPU waits."""
    if dist.get_world_size() == 1:
        return flags
    numbers = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return tuple(bool(number) for number in numbers)


def largest_of_ranks(number: float) -> float:
    """The largest of all ranks' numbers; the tensor is on the CPU, so no GPU waits."""
    if dist.get_world_size() == 1:
        return number
    numbers = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return float(numbers)


def from_first_rank[Found](find: Callable[[], Found], group: dist.ProcessGroup | None = None) -> Found:
    """What `find()` returns on rank 0, on every rank; raises its UserError on every rank."""
    if dist.get_world_size() == 1:
        return find()
    found: list[Any] = [None]
    with failing_together(group):
        if dist.get_rank() == 0:
            found[0] = find()
    dist.broadcast_object_list(found, src=0, group=group)
    return found[0]


@contextmanager
def failing_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A barrier at the end of the block; a UserError in it on some ranks is raised on all of them."""
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    of_ranks: list[UserError | None] = [own]
    if dist.get_world_size() > 1:
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, own, group=group)
    if own is not None:
        raise own
    for other in of_ranks:
        if other is not None:
            raise other
