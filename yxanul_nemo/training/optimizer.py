"""Updates of FP32 main parameters, with clipping and the skip of bad gradients decided on the device, without a host synchronization.

The same class serves CPUs and GPUs, so moments and main parameters in a checkpoint mean the same everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from yxanul_nemo.config.training import OptimConfig
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.model.matrices import layer_matrices
from yxanul_nemo.model.sharding import row_blocks
from yxanul_nemo.training.adamw import AdamW
from yxanul_nemo.training.flat_parameters import FlatParameters
from yxanul_nemo.training.muon import Muon


class MainParamOptimizer:
    """AdamW, or Muon with AdamW, over the FP32 main parameters that are this rank's to update.

    Args:
        model: whose parameters are updated in place; `flat` has them and their gradients from here on.
        data_group: data-parallel ranks, those that share a window included.
        is_shared: whether each of these updates its part only.
        tensor_group: ranks that share the matrices; a shard's gradient counts on each of them, a copy's once.
    """

    def __init__(
        self,
        model: YxanulGPT,
        optim: OptimConfig,
        data_group: dist.ProcessGroup,
        is_shared: bool,
        tensor_group: dist.ProcessGroup,
    ):
        kinds = () if optim.muon is None else layer_matrices(model)
        self.flat = FlatParameters(model.parameters(), data_group, is_shared, stacked=[kind.params for kind in kinds])
        self.tensor_group = tensor_group
        self.mains = [part.main for part in self.flat.parts]
        device = self.flat.params[0].device
        self.grad_clip = torch.ones((), device=device)
        self.update_count = torch.zeros(1, device=device)
        self.counted = [
            part.grad
            for part in self.flat.parts
            if tensor_group.rank() == 0 or getattr(part.param, "tensor_model_parallel", False)
        ]
        stacked = {id(part) for stacks in self.flat.stacks for stack in stacks for part in stack.parts}
        others = [part for part in self.flat.parts if id(part) not in stacked]
        lr_factor = 1.0 if optim.muon is None else optim.muon.adamw_lr_factor
        self.adamw = AdamW(others, optim, device, lr_factor)
        self.muon = None if optim.muon is None else Muon(kinds, self.flat.stacks, optim, tensor_group)
        self.rules = [rule for rule in (self.adamw, self.muon) if rule is not None]

    def step(self, lr: float, grad_clip: float, admits: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Update from the reduced gradients; returns (norm before clipping, whether the update was applied).

        `admits(norm)` decides whether anything is applied. All of these are scalars on the device.
        """
        self.set_rates(lr, grad_clip)
        return self.update(admits)

    def set_rates(self, lr: float, grad_clip: float) -> None:
        """Learning rate and largest gradient norm of the next update."""
        for rule in self.rules:
            rule.set_lr(lr)
        self.grad_clip.fill_(grad_clip)

    @torch.no_grad()
    def update(self, admits: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`step` with the rates set before: work on the device alone, so that a CUDA graph can hold it."""
        squares = torch.zeros((), dtype=torch.float64, device=self.update_count.device)
        if self.counted:
            squares += torch.nn.utils.get_total_norm(self.counted).double().square()
        if self.flat.is_shared:
            dist.all_reduce(squares, group=self.flat.group)
        if self.tensor_group.size() > 1:
            dist.all_reduce(squares, group=self.tensor_group)
        norm = squares.sqrt().float()
        applied = admits(norm)
        grad_scale = torch.clamp((norm + 1e-6) / self.grad_clip, min=1.0)
        for rule in self.rules:
            rule.update(grad_scale, applied)
        self.update_count += applied
        self.flat.publish(stacks_are_rounded=True)
        return norm, applied

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """FP32 weights (as `model.<name>`), moments and the update count as Megatron-core's sharded tensors over live storage.

        Rounded parameters are not among them: they follow from the main ones.

        Args:
            model_state: `sharded_state_dict()` of the model.
        """
        described = [v for v in nested_values(model_state) if isinstance(v, ShardedTensor | ShardedTensorFactory)]
        by_param = {id(value.data): value for value in described}
        state: dict[str, Any] = {}
        number = 0
        for rule in self.rules:
            for part, moments in rule.moments():
                tensors = {f"optimizer.{name}": tensor for name, tensor in moments.items()}
                for prefix, tensor in (tensors | {"model": part.main}).items():
                    blocks = row_blocks(by_param[id(part.param)], part.first_row, tensor, prefix, self.flat.is_shared)
                    state[f"{prefix}.{number}"] = list(blocks)
                number += 1
        if self.muon is not None:
            state |= self.muon.sharded_row_moments(by_param, self.flat.is_shared)
        state["optimizer.step"] = ShardedTensor.from_rank_offsets(
            "optimizer.step", self.update_count, replica_id=min(1, dist.get_rank())
        )
        return state

    @torch.no_grad()
    def after_load(self) -> None:
        """Bring what is derived from loaded tensors in line with them: AdamW's counts, and the model's parameters."""
        self.adamw.set_count(self.update_count)
        self.flat.publish()
