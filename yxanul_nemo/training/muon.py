"""Muon on main parameters: momentum of the layers' matrices, orthogonalized (https://kellerjordan.github.io/posts/muon/).

Its update of a matrix is scaled by 0.2 sqrt(longer side), so that its numbers have a root mean square of about 0.2, as AdamW's have, and
learning rate and weight decay mean the same for both (Liu et al., arXiv:2502.16982). On top of it, each by a key: rows divided by their
running root mean square (NorMuon, Li et al., arXiv:2510.05491), decay only where the update agrees (Chen et al., arXiv:2510.12402).

Letters: N matrices of the rank's share, R rows, C columns; W rows of whole matrices, where tensor-parallel ranks share them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from yxanul_nemo.config.training import OptimConfig
from yxanul_nemo.kernels.muon_ops import apply_update, mix_momentum
from yxanul_nemo.kernels.polar import TINIEST, polar_factors
from yxanul_nemo.model.matrices import MatrixKind, Pieces
from yxanul_nemo.model.sharding import sharded_tensors
from yxanul_nemo.training.flat_parameters import Part, Stack

ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates, before the learning rate (arXiv:2502.16982)."""
NEURON_EPS = 1e-10
"""Added to rows' mean squares, which are about 1 over the longer side."""


class Muon:
    """Muon over the layers' matrices.

    Args:
        stacks: for each of `kinds`, the parameters that are this rank's to update, in one or several buckets.
        tensor_group: ranks that share the matrices: each orthogonalizes the whole ones.
    """

    def __init__(
        self,
        kinds: Sequence[MatrixKind],
        stacks: Sequence[Sequence[Stack]],
        optim: OptimConfig,
        tensor_group: dist.ProcessGroup,
    ):
        self.lr = torch.zeros((), device=kinds[0].params[0].device)
        self.kinds = [
            _Kind(kind, of_kind, optim, tensor_group) for kind, of_kind in zip(kinds, stacks, strict=True) if of_kind
        ]

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next update."""
        self.lr.fill_(lr)

    def update(self, grad_scale: Tensor, applied: Tensor) -> None:
        """One update by the gradients over `grad_scale`; nothing where not `applied`. Both are scalars on the device."""
        for kind in self.kinds:
            kind.update(self.lr, grad_scale, applied)

    def moments(self) -> list[tuple[Part, dict[str, Tensor]]]:
        """Each part with its momentum, of the part's shape."""
        return [
            (part, {"momentum": momentum})
            for kind in self.kinds
            for part, momentum in zip(kind.parts, kind.momentum_NRC, strict=True)
        ]

    def sharded_row_moments(
        self, by_param: Mapping[int, ShardedTensor | ShardedTensorFactory], is_shared: bool
    ) -> dict[str, Any]:
        """Mean squares of rows as `optimizer.neuron_square.<key of the parameter>` [layers, rows], in the order of the pieces.

        Args:
            by_param: what Megatron-core says of each parameter, by the parameter's id.
            is_shared: whether other data-parallel ranks have other matrices, and not the same ones.
        """
        state: dict[str, Any] = {}
        for kind in self.kinds:
            if kind.neuron_squares_NW is None:
                continue
            for part, squares_W in zip(kind.parts, kind.neuron_squares_NW, strict=True):
                described = next(sharded_tensors({"": by_param[id(part.param)]}))
                state[f"neuron_square.{len(state)}"] = dataclasses.replace(
                    described,
                    key=f"optimizer.neuron_square.{described.key}",
                    data=squares_W,
                    dtype=squares_W.dtype,
                    local_shape=tuple(squares_W.shape),
                    global_shape=(*described.global_shape[: described.prepend_axis_num], len(squares_W)),
                    global_offset=(*described.global_offset[: described.prepend_axis_num], 0),
                    axis_fragmentations=None,
                    # Megatron-core's last two numbers count tensor- and data-parallel ranks.
                    replica_id=(0, kind.tensor_group.rank(), 0 if is_shared else described.replica_id[-1]),
                )
        return state


class _Kind:
    """The rank's parameters of one kind, and Muon's state of them."""

    def __init__(self, kind: MatrixKind, stacks: Sequence[Stack], optim: OptimConfig, tensor_group: dist.ProcessGroup):
        assert optim.muon is not None
        self.kind, self.stacks, self.tensor_group = kind, stacks, tensor_group
        self.weight_decay, self.muon = optim.weight_decay, optim.muon
        self.parts = [part for stack in stacks for part in stack.parts]
        self.momentum_NRC = stacks[0].mains.new_zeros(len(self.parts), *self.parts[0].main.shape)
        self.neuron_squares_NW = None
        if self.muon.neuron_norm:
            whole_rows = sum(pieces.count * self._whole_rows(pieces) for pieces in kind.pieces)
            self.neuron_squares_NW = self.momentum_NRC.new_zeros(len(self.parts), whole_rows)

    def update(self, lr: Tensor, grad_scale: Tensor, applied: Tensor) -> None:
        """As `Muon.update`."""
        # In the order of the pieces' rows, as everything up to the weights themselves.
        mixed_NRC = torch.empty_like(self.momentum_NRC, dtype=self.parts[0].param.dtype)
        squares_NR = self.momentum_NRC.new_empty(self.momentum_NRC.shape[:2])
        for own, stack in self._of_stacks():
            mix_momentum(
                stack.grads,
                self.momentum_NRC[own],
                mixed_NRC[own],
                squares_NR[own],
                self.kind.places,
                grad_scale,
                applied,
                self.muon.momentum,
                self.muon.nesterov,
            )
        updates_NRC, factors_NR = self._orthogonalized(mixed_NRC, squares_NR, applied)
        for own, stack in self._of_stacks():
            apply_update(
                stack.mains,
                stack.values,
                updates_NRC[own],
                factors_NR[own],
                self.kind.places,
                lr,
                applied,
                self.weight_decay,
                self.muon.cautious_decay,
            )

    def _orthogonalized(self, mixed_NRC: Tensor, squares_NR: Tensor, applied: Tensor) -> tuple[Tensor, Tensor]:
        """Updates of the same shape, and what their rows are to be multiplied by [N, R]."""
        found, first, first_whole = [], 0, 0
        for pieces in self.kind.pieces:
            rows, whole_rows = pieces.count * pieces.rows, pieces.count * self._whole_rows(pieces)
            here, whole = slice(first, first + rows), slice(first_whole, first_whole + whole_rows)
            squares_NW = None if self.neuron_squares_NW is None else self.neuron_squares_NW[:, whole]
            found.append(
                self._orthogonalized_pieces(pieces, mixed_NRC[:, here], squares_NR[:, here], squares_NW, applied)
            )
            first, first_whole = first + rows, first_whole + whole_rows
        if len(found) == 1:
            return found[0]
        updates, factors = zip(*found, strict=True)
        return torch.cat(updates, dim=1), torch.cat(factors, dim=1)

    def _of_stacks(self) -> Iterator[tuple[slice, Stack]]:
        """Each bucket's stack with its place among the rank's parameters."""
        first = 0
        for stack in self.stacks:
            yield slice(first, first + len(stack.parts)), stack
            first += len(stack.parts)

    def _whole_rows(self, pieces: Pieces) -> int:
        return pieces.rows * (self.tensor_group.size() if self.kind.split_dim == 0 else 1)

    def _orthogonalized_pieces(
        self,
        pieces: Pieces,
        mixed_NRC: Tensor,
        squares_NR: Tensor,
        neuron_squares_NW: Tensor | None,
        applied: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`_orthogonalized` of some of a parameter's rows, which are matrices of one shape."""
        shape = (pieces.count, pieces.rows)
        # From here on, N counts pieces.
        local_NRC = mixed_NRC if pieces.count == 1 else mixed_NRC.unflatten(1, shape).flatten(0, 1)
        squares_N = squares_NR.unflatten(1, shape).sum(-1).flatten()
        whole_NWC = self._gathered(local_NRC)
        if self.tensor_group.size() > 1:
            dist.all_reduce(squares_N, group=self.tensor_group)
        whole_NWC = polar_factors(whole_NWC, squares_N)
        scale = ADAMW_RMS * math.sqrt(max(whole_NWC.shape[1:]))
        if neuron_squares_NW is None:
            factors_NW = whole_NWC.new_full(whole_NWC.shape[:2], scale, dtype=torch.float32)
        else:
            of_pieces = neuron_squares_NW.unflatten(1, (pieces.count, -1))
            factors_NW = scale * _neuron_factors(whole_NWC, of_pieces, self.muon.neuron_beta, applied)
        own = self._own(whole_NWC), self._own_rows(factors_NW)
        updates_NRC, factors_NR = (x.contiguous().unflatten(0, (-1, pieces.count)).flatten(1, 2) for x in own)
        return updates_NRC, factors_NR

    def _gathered(self, local_NRC: Tensor) -> Tensor:
        """Whole matrices from each tensor-parallel rank's part of them."""
        ranks = self.tensor_group.size()
        if ranks == 1:
            return local_NRC
        parts = local_NRC.new_empty(ranks, *local_NRC.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), local_NRC.contiguous(), group=self.tensor_group)
        if self.kind.split_dim == 0:
            return parts.transpose(0, 1).flatten(1, 2)
        return parts.permute(1, 2, 0, 3).flatten(2, 3)

    def _own(self, whole_NWC: Tensor) -> Tensor:
        """This tensor-parallel rank's part of whole matrices."""
        return whole_NWC.chunk(self.tensor_group.size(), dim=1 + self.kind.split_dim)[self.tensor_group.rank()]

    def _own_rows(self, of_rows_NW: Tensor) -> Tensor:
        """What belongs to the rows of this rank's part."""
        if self.kind.split_dim == 1:
            return of_rows_NW
        return of_rows_NW.chunk(self.tensor_group.size(), dim=1)[self.tensor_group.rank()]


def _neuron_factors(updates_NWC: Tensor, mean_squares: Tensor, beta: float, applied: Tensor) -> Tensor:
    """What each row is multiplied by [N, W]: 1 over its running root mean square, times what leaves the matrix's norm as it was.

    Args:
        mean_squares: of rows, the running ones [parameters, pieces, W], changed in place unless not `applied`.
    """
    squares_NW = torch.linalg.vector_norm(updates_NWC, dim=-1, dtype=torch.float32).square()
    now = (squares_NW / updates_NWC.size(-1)).view(mean_squares.shape)
    mean_squares.copy_(torch.where(applied, mean_squares.lerp(now, 1 - beta), mean_squares))
    factors_NW = (mean_squares + NEURON_EPS).rsqrt().flatten(0, 1)
    after_N1 = (squares_NW * factors_NW.square()).sum(-1, keepdim=True)
    return factors_NW * (squares_NW.sum(-1, keepdim=True) / after_N1.clamp(min=TINIEST)).sqrt()
