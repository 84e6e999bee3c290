"""AdamW on FP32 main parameters, with clipping and the skip of non-finite gradients decided on the device, without a host synchronization.

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
from yxanul_nemo.model.sharding import row_blocks
from yxanul_nemo.training.flat_parameters import FlatParameters

MOMENTS = ("exp_avg", "exp_avg_sq")


class MainParamAdamW:
    """torch's fused AdamW (decoupled weight decay, arXiv:1711.05101) over the FP32 main parameters that are this rank's to update.

    Args:
        flat: the model's parameters, which are updated in place, and their gradients.
        tensor_group: ranks that share the matrices; a shard's gradient counts on each of them, a copy's once.
    """

    def __init__(self, flat: FlatParameters, optim: OptimConfig, tensor_group: dist.ProcessGroup):
        self.flat, self.tensor_group = flat, tensor_group
        self.mains = [part.main for part in flat.parts]
        device = flat.params[0].device
        self.lr = torch.zeros((), device=device)
        self.grad_clip = torch.ones((), device=device)
        self.counted = [
            part.grad
            for part in flat.parts
            if tensor_group.rank() == 0 or getattr(part.param, "tensor_model_parallel", False)
        ]
        # Matrices are decayed, vectors (the norms) are not: Megatron-core's rule, by shape and not by name.
        groups = [
            {"params": [m for m in self.mains if m.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [m for m in self.mains if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.update_count = torch.zeros(1, device=device)
        # torch creates the state at the first step; a checkpoint needs it to be there before.
        for main in self.mains:
            self.adamw.state[main] = {
                "step": torch.zeros((), device=device),
                **{moment: torch.zeros_like(main) for moment in MOMENTS},
            }

    def step(self, lr: float, grad_clip: float, admits: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Update from the reduced gradients; returns (norm before clipping, whether the update was applied).

        `admits(norm)` decides whether anything is applied. All of these are scalars on the device.
        """
        self.set_rates(lr, grad_clip)
        return self.update(admits)

    def set_rates(self, lr: float, grad_clip: float) -> None:
        """Learning rate and largest gradient norm of the next update."""
        self.lr.fill_(lr)
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
        # torch's fused optimizers divide gradients by grad_scale and do nothing where found_inf is 1 (the contract that
        # torch.amp.GradScaler uses with them), so clipping and skipping cost no pass over the gradients of their own.
        self.adamw.grad_scale = torch.clamp((norm + 1e-6) / self.grad_clip, min=1.0)
        self.adamw.found_inf = (~applied).float()
        for part in self.flat.parts:
            part.main.grad = part.grad
        self.adamw.step()
        for part in self.flat.parts:
            part.main.grad = None
        self.update_count += applied
        self.flat.publish()
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
        for number, part in enumerate(self.flat.parts):
            tensors = {f"optimizer.{moment}": self.adamw.state[part.main][moment] for moment in MOMENTS}
            for prefix, tensor in (tensors | {"model": part.main}).items():
                blocks = row_blocks(by_param[id(part.param)], part.first_row, tensor, prefix, self.flat.is_shared)
                state[f"{prefix}.{number}"] = list(blocks)
        # AdamW counts updates per parameter; they are all equal, so one number is kept.
        state["optimizer.step"] = ShardedTensor.from_rank_offsets(
            "optimizer.step", self.update_count, replica_id=min(1, dist.get_rank())
        )
        return state

    @torch.no_grad()
    def after_load(self) -> None:
        """Bring what is derived from loaded tensors in line: each parameter's count, and the model's parameters."""
        for main in self.mains:
            self.adamw.state[main]["step"].copy_(self.update_count[0])
        self.flat.publish()
