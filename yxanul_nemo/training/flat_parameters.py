"""Parameters and gradients of a rank in a few pieces of memory, which data-parallel ranks sum and, with `is_shared`, share out.

Sharing (ZeRO-1, arXiv:1910.02054): each rank keeps main parameters and moments of its part alone. Sums of gradients are scattered, each
rank updates its part, and rounded parameters are gathered. Cuts between parts lie between rows, so a part of a matrix is a block of
rows, which a checkpoint can say as a block of the global tensor (`model.sharding.row_blocks`). Matrices that an optimizer must see whole
lie in buckets of one shape, as stacks, where cuts lie between matrices.

It takes the place of Megatron-core's DistributedDataParallel, whose buffers are on CUDA devices unconditionally and whose parts end
inside rows (megatron-core 0.19, param_and_grad_buffer): here CPUs and GPUs do the same, so that tests on CPUs speak for both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

ALIGNMENT = 128
"""Elements that the place of each parameter is a multiple of: 256 bytes in BF16, which is what torch's allocator gives."""
BUCKET_ELEMENTS = 32 << 20
"""Parameters that are reduced together: 128 MiB of gradients, long enough for full speed."""


@dataclass(frozen=True)
class Part:
    """What this rank updates of one parameter: all of it, or some of its rows."""

    param: Parameter
    first_row: int
    main: Tensor
    """FP32, rows of the parameter's shape."""
    grad: Tensor
    """FP32, of the same rows."""


@dataclass(frozen=True)
class Stack:
    """Whole parameters of one shape that this rank updates, which lie one after another in memory."""

    parts: tuple[Part, ...]
    mains: Tensor
    """FP32 [parts, *shape], of which the parts' are views."""
    grads: Tensor
    """The same of the gradients."""
    values: Tensor | None
    """The same of what layers compute with; None where those are the mains."""


class FlatParameters:
    """A model's parameters moved into buckets of memory, with FP32 gradients that add up over micro-batches.

    Args:
        params: all of a model; the gradient of each must be computed in every backward pass.
        group: data-parallel ranks, those that share a window included.
        is_shared: whether each rank updates its part only. Alone, a rank's part is everything.
        stacked: groups of these parameters, each of one shape, of which a rank updates none or the whole.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        group: dist.ProcessGroup,
        is_shared: bool,
        stacked: Sequence[Sequence[Parameter]] = (),
        bucket_elements: int = BUCKET_ELEMENTS,
    ):
        self.group, self.is_shared = group, is_shared and group.size() > 1
        self.params = [param for param in params if param.requires_grad]
        in_stacks = {id(param) for of_stack in stacked for param in of_stack}
        others = [param for param in self.params if id(param) not in in_stacks]
        self.buckets = [_Bucket(of_bucket, group, self.is_shared) for of_bucket in _split(others, bucket_elements)]
        shares = group.size() if self.is_shared else 1
        self.stacks: list[list[Stack]] = []
        """For each group of `stacked`, this rank's parameters in one or several buckets."""
        for of_group in stacked:
            buckets = [
                _Bucket(of_bucket, group, self.is_shared, whole=True)
                for of_bucket in _split_stack(of_group, bucket_elements, shares)
            ]
            self.buckets += buckets
            self.stacks.append([bucket.stack() for bucket in buckets if bucket.parts])
        self.parts = [part for bucket in self.buckets for part in bucket.parts]
        for bucket in self.buckets:
            bucket.add_up_gradients()

    def zero_grads(self) -> None:
        """Begin a step."""
        for bucket in self.buckets:
            bucket.grads.zero_()

    def reduce_grads(self) -> None:
        """Sum the gradients over the group; where parameters are shared out, each rank then has those of its own parts only."""
        for bucket in self.buckets:
            bucket.reduce()

    def publish(self, stacks_are_rounded: bool = False) -> None:
        """Round the main parameters into the model's, on all ranks.

        Args:
            stacks_are_rounded: each rank has seen to that for its stacks.
        """
        for bucket in self.buckets:
            bucket.publish(is_rounded=bucket.is_whole and stacks_are_rounded)


class _Bucket:
    """Parameters of one dtype, one after another in memory, in as many equal shares as ranks update them.

    Args:
        whole: cut between parameters, all of one shape, and not only between rows.
    """

    def __init__(self, params: Sequence[Parameter], group: dist.ProcessGroup, is_shared: bool, whole: bool = False):
        self.params, self.group, self.is_shared, self.is_whole = list(params), group, is_shared, whole
        shapes = [tuple(p.shape) for p in params]
        begins, share = (stack_places if whole else places)(shapes, group.size() if is_shared else 1)
        rank = group.rank() if is_shared else 0
        size = share * (group.size() if is_shared else 1)
        self.values = params[0].detach().new_zeros(size)
        self.grads = torch.zeros(size, dtype=torch.float32, device=self.values.device)
        self.own = slice(rank * share, (rank + 1) * share)
        for param, begin in zip(params, begins, strict=True):
            view = self.values[begin : begin + param.numel()].view_as(param)
            view.copy_(param.detach())
            param.data = view
        self.mains = self.values[self.own]
        if self.values.dtype != torch.float32:
            self.mains = self.mains.float()
        self.grad_views = [self.grads[b : b + p.numel()].view_as(p) for p, b in zip(params, begins, strict=True)]
        self.parts = [part for p, b in zip(params, begins, strict=True) if (part := self._part(p, b)) is not None]

    def _part(self, param: Parameter, begin: int) -> Part | None:
        first = max(begin, self.own.start)
        count = min(begin + param.numel(), self.own.stop) - first
        if count <= 0:
            return None
        shape = (count // _width(tuple(param.shape)), *param.shape[1:])
        at = first - self.own.start
        return Part(
            param,
            first_row=(first - begin) // _width(tuple(param.shape)),
            main=self.mains[at : at + count].view(shape),
            grad=self.grads[first : first + count].view(shape),
        )

    def stack(self) -> Stack:
        """This rank's share, where all parameters have one shape and are whole."""
        shape, count = self.parts[0].main.shape, len(self.parts)
        stride = _stack_stride(tuple(shape))

        def stacked(share: Tensor) -> Tensor:
            return share[: count * stride].view(count, stride)[:, : shape.numel()].unflatten(1, shape)

        values = None if self.values.dtype == torch.float32 else stacked(self.values[self.own])
        return Stack(tuple(self.parts), stacked(self.mains), stacked(self.grads[self.own]), values)

    def add_up_gradients(self) -> None:
        """Have each gradient that a backward pass computes added to those in the bucket.

        A backward pass may also add to a parameter's `main_grad` itself, as Megatron-core calls its place in the bucket, and then give
        autograd no gradient.
        """

        def add(grad: Tensor, param: Tensor) -> None:
            # torch 2.11 also calls when a backward pass gave no gradient, having added it itself.
            if param.grad is not None:
                grad.add_(param.grad)
                param.grad = None

        for param, grad in zip(self.params, self.grad_views, strict=True):
            param.main_grad = grad  # type: ignore[attr-defined]  # Megatron-core's name
            param.register_post_accumulate_grad_hook(partial(add, grad))

    def reduce(self) -> None:
        """Sum over the ranks."""
        if self.group.size() == 1:
            return
        if self.is_shared:
            dist.reduce_scatter_tensor(self.grads[self.own], self.grads, group=self.group)
        else:
            dist.all_reduce(self.grads, group=self.group)

    def publish(self, is_rounded: bool) -> None:
        """As `FlatParameters.publish`."""
        if self.values.dtype != torch.float32 and not is_rounded:
            self.values[self.own].copy_(self.mains)
        if self.is_shared:
            dist.all_gather_into_tensor(self.values, self.values[self.own], group=self.group)


def places(shapes: Sequence[tuple[int, ...]], shares: int) -> tuple[list[int], int]:
    """Where tensors begin in memory that is cut into equal shares, each cut between two rows; and the size of a share, in elements.

    A tensor begins at a multiple of its row and of `ALIGNMENT`, and a share is a multiple of them all. That costs memory only where
    widths have little in common.
    """
    units = [math.lcm(_width(shape), ALIGNMENT) for shape in shapes]
    begins, end = [], 0
    for shape, unit in zip(shapes, units, strict=True):
        begins.append(-(-end // unit) * unit)
        end = begins[-1] + math.prod(shape)
    # With one share there is no cut to be anywhere.
    unit = math.lcm(*units) if shares > 1 else ALIGNMENT
    return begins, -(-end // (shares * unit)) * unit


def stack_places(shapes: Sequence[tuple[int, ...]], shares: int) -> tuple[list[int], int]:
    """`places` for tensors of one shape that lie at equal distances and are not cut."""
    stride = _stack_stride(shapes[0])
    assert all(shape == shapes[0] for shape in shapes)
    return [number * stride for number in range(len(shapes))], -(-len(shapes) // shares) * stride


def _stack_stride(shape: tuple[int, ...]) -> int:
    """Elements from the beginning of a tensor in a stack to that of the next."""
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def _width(shape: tuple[int, ...]) -> int:
    """Elements of a row."""
    return math.prod(shape[1:])


def _split(params: Sequence[Parameter], most_elements: int) -> list[list[Parameter]]:
    """Neighbours of one dtype, up to so many elements or one parameter."""
    buckets: dict[torch.dtype, list[list[Parameter]]] = {}
    for param in params:
        of_dtype = buckets.setdefault(param.dtype, [[]])
        if of_dtype[-1] and sum(p.numel() for p in of_dtype[-1]) + param.numel() > most_elements:
            of_dtype.append([])
        of_dtype[-1].append(param)
    return [bucket for of_dtype in buckets.values() for bucket in of_dtype]


def _split_stack(params: Sequence[Parameter], most_elements: int, shares: int) -> list[Sequence[Parameter]]:
    """Runs of them of up to so many elements, or one for each share; only the last may leave shares that are not full."""
    count = max(1, most_elements // (params[0].numel() * shares)) * shares
    return [params[first : first + count] for first in range(0, len(params), count)]
