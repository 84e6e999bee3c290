"""AdamW on FP32 main parameters, with clipping and the skip of non-finite gradients decided on the device, without a host synchronization.

The same class serves CPUs and GPUs, so moments and main parameters in a checkpoint mean the same everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor
from torch.nn import Parameter

from yxanul_nemo.config.training import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
ALIGNMENT = 128
"""Elements that the place of each parameter in the flat copy is a multiple of."""


class MainParamAdamW:
    """torch's fused AdamW (decoupled weight decay, arXiv:1711.05101) over an FP32 copy of each parameter that is not FP32 itself.

    Args:
        model: its parameters are updated in place.
        tensor_group: ranks that share the matrices; a shard's gradient counts on each of them, a copy's once.
    """

    def __init__(self, model: torch.nn.Module, optim: OptimConfig, tensor_group: dist.ProcessGroup):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.mains, self.rounded = _main_copies(self.params)
        self.tensor_group = tensor_group
        device = self.params[0].device
        self.lr = torch.zeros((), device=device)
        self.grad_clip = torch.ones((), device=device)
        self.counted = [
            i
            for i, p in enumerate(self.params)
            if tensor_group.rank() == 0 or getattr(p, "tensor_model_parallel", False)
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

    def step(
        self, grads: Sequence[Tensor], lr: float, grad_clip: float, admits: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Update from FP32 gradients in the order of `params`; returns (norm before clipping, whether the update was applied).

        `admits(norm)` decides whether anything is applied. All of these are scalars on the device.
        """
        self.set_rates(lr, grad_clip)
        return self.update(grads, admits)

    def set_rates(self, lr: float, grad_clip: float) -> None:
        """Learning rate and largest gradient norm of the next update."""
        self.lr.fill_(lr)
        self.grad_clip.fill_(grad_clip)

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], admits: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`step` with the rates set before: work on the device alone, so that a CUDA graph can hold it."""
        squares = torch.zeros((), dtype=torch.float64, device=self.update_count.device)
        if self.counted:
            squares += torch.nn.utils.get_total_norm([grads[i] for i in self.counted]).double().square()
        if self.tensor_group.size() > 1:
            dist.all_reduce(squares, group=self.tensor_group)
        norm = squares.sqrt().float()
        applied = admits(norm)
        # torch's fused optimizers divide gradients by grad_scale and do nothing where found_inf is 1 (the contract that
        # torch.amp.GradScaler uses with them), so clipping and skipping cost no pass over the gradients of their own.
        self.adamw.grad_scale = torch.clamp((norm + 1e-6) / self.grad_clip, min=1.0)
        self.adamw.found_inf = (~applied).float()
        for main, grad in zip(self.mains, grads, strict=True):
            main.grad = grad
        self.adamw.step()
        for main in self.mains:
            main.grad = None
        self.update_count += applied
        self._round()
        return norm, applied

    def _round(self) -> None:
        if self.rounded is not None:
            rounded, mains = self.rounded
            rounded.copy_(mains)

    def sharded_state(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """FP32 weights (as `model.<name>`), moments and the update count as Megatron-core's sharded tensors over live storage.

        Rounded parameters are not among them: they follow from the main ones.

        Args:
            model_state: `sharded_state_dict()` of the model.
        """
        described = [v for v in nested_values(model_state) if isinstance(v, ShardedTensor | ShardedTensorFactory)]
        by_param = {id(value.data): value for value in described}
        state: dict[str, Any] = {}
        for param, main in zip(self.params, self.mains, strict=True):
            tensors = {f"optimizer.{moment}": self.adamw.state[main][moment] for moment in MOMENTS}
            for prefix, tensor in (tensors | {"model": main.detach()}).items():
                described_as = by_param[id(param)]
                state[f"{prefix}.{id(param)}"] = make_sharded_optimizer_tensor(described_as, tensor, prefix)
        # AdamW counts updates per parameter; they are all equal, so one number is kept.
        state["optimizer.step"] = ShardedTensor.from_rank_offsets(
            "optimizer.step", self.update_count, replica_id=min(1, dist.get_rank())
        )
        return state

    @torch.no_grad()
    def after_load(self) -> None:
        """Bring what is derived from loaded tensors in line: each parameter's count, and the rounded parameters."""
        for main in self.mains:
            self.adamw.state[main]["step"].copy_(self.update_count[0])
        self._round()


def _main_copies(params: Sequence[Parameter]) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
    """The FP32 main of each parameter, and (all rounded parameters, their mains) as two flat tensors, None if there are none.

    A parameter that is FP32 is its own main. The others are moved into one piece of memory, so that rounding all mains is one kernel
    and not one for each parameter.
    """
    rounded = [p for p in params if p.dtype != torch.float32]
    if not rounded:
        return list(params), None
    # Matrix products ask for aligned rows; 256 bytes is what torch's allocator gives.
    sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in rounded]
    flat_params = rounded[0].new_zeros(sum(sizes))
    flat_mains = torch.zeros_like(flat_params, dtype=torch.float32)
    main_of: dict[Parameter, Tensor] = {}
    for param, values, main in zip(rounded, flat_params.split(sizes), flat_mains.split(sizes), strict=True):
        values[: param.numel()].copy_(param.detach().view(-1))
        param.data = values[: param.numel()].view_as(param)
        main_of[param] = main[: param.numel()].view_as(param)
    flat_mains.copy_(flat_params)
    return [main_of.get(p, p) for p in params], (flat_params, flat_mains)
