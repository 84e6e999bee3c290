"""Ranks that act alike: what one of them is asked, finds or fails at is known to all, so that none waits for one that has left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from yxanul_nemo.errors import UserError


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank. Every rank must call it; the tensor is on the CPU, so no GPU waits."""
    if dist.get_world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def from_first_rank[Found](find: Callable[[], Found]) -> Found:
    """What `find()` returns on rank 0, on every rank; raises its UserError on every rank."""
    found: list[Any] = [None]
    with failing_together():
        if dist.get_rank() == 0:
            found[0] = find()
    dist.broadcast_object_list(found, src=0)
    return found[0]


@contextmanager
def failing_together() -> Iterator[None]:
    """A barrier at the end of the block; a UserError in it on some ranks is raised on all of them."""
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    parts = (own.where, own.problem, own.expected, own.fix) if own is not None else None
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, parts)
    if own is not None:
        raise own
    for parts in of_ranks:
        if parts is not None:
            raise UserError(*parts)
