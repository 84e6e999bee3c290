"""Training on CPUs: gloo data parallelism, torch AdamW, gradient clipping that knows about tensor parallelism.

Megatron-core's own wrapper and optimizers place buffers on CUDA devices unconditionally (megatron-core 0.19:
param_and_grad_buffer, clip_grads, optimizer); this is the same mathematics in plain torch.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from yxanul_nemo.config.training import OptimConfig
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.backend import StepResult

MOMENTS = ("exp_avg", "exp_avg_sq")


class CpuBackend:
    """One rank's model and optimizer; see `training.backend.Backend` for the contract."""

    def __init__(self, model: YxanulGPT, optim: OptimConfig):
        self.model = model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        self.update_count = torch.zeros(1)
        self.data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        for param in self.params:
            dist.broadcast(param.data, dist.get_process_group_ranks(self.data_group)[0], group=self.data_group)
            self._create_moments(param)

    def train_step(self, ids_ABT: Tensor, labels_ABT: Tensor, lr: float, grad_clip: float) -> StepResult:
        """One optimizer step over the accumulated micro-batches of this rank [accumulation, micro_batch_size, seq_len]."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64)
        scale = 1.0 / (ids_ABT.numel() * self.data_group.size())
        for ids_BT, labels_BT in zip(ids_ABT, labels_ABT, strict=True):
            loss_BT = self.model(ids_BT, labels_BT)
            (loss_BT.sum() * scale).backward()
            loss_sum += loss_BT.detach().sum(dtype=torch.float64)
        self._sum_over_data_ranks()
        loss = loss_sum * scale
        dist.all_reduce(loss, group=self.data_group)
        norm = self._clip(grad_clip)
        applied = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.update_count += 1
        return StepResult(loss=loss, grad_norm=norm, applied=applied)

    def sharded_state(self) -> dict[str, Any]:
        """Weights, both moments and the update count of each parameter, as views that `ShardReader` can also fill."""
        model_state = self.model.sharded_state_dict()
        state: dict[str, Any] = {"model": model_state}
        described = [v for v in nested_values(model_state) if isinstance(v, ShardedTensor | ShardedTensorFactory)]
        by_param = {id(value.data): value for value in described}
        for param in self.params:
            for moment in MOMENTS:
                sharded = make_sharded_optimizer_tensor(
                    by_param[id(param)], self.optimizer.state[param][moment], f"optimizer.{moment}"
                )
                state[sharded.key] = sharded
        # AdamW counts updates per parameter; they are all equal, so one number is kept.
        state["optimizer.step"] = ShardedTensor.from_rank_offsets(
            "optimizer.step", self.update_count, replica_id=min(1, dist.get_rank())
        )
        return state

    def after_load(self) -> None:
        """Bring what is derived from the loaded state in line with it."""
        for param in self.params:
            self.optimizer.state[param]["step"].copy_(self.update_count[0])

    def _create_moments(self, param: torch.nn.Parameter) -> None:
        """torch creates AdamW's state at the first step; a checkpoint needs it to be there before."""
        self.optimizer.state[param] = {
            "step": torch.zeros(()),
            **{moment: torch.zeros_like(param, memory_format=torch.preserve_format) for moment in MOMENTS},
        }

    def _sum_over_data_ranks(self) -> None:
        if self.data_group.size() == 1:
            return
        flat = torch.cat([param.grad.reshape(-1) for param in self.params])
        dist.all_reduce(flat, group=self.data_group)
        for param, grad in zip(self.params, flat.split([p.numel() for p in self.params]), strict=True):
            param.grad.copy_(grad.view_as(param))

    def _clip(self, grad_clip: float) -> Tensor:
        """Scale gradients down to norm `grad_clip`; returns the norm before. Shards count on each rank, copies once."""
        is_first = self.tensor_group.rank() == 0
        squares = [
            param.grad.double().square().sum()
            for param in self.params
            if is_first or getattr(param, "tensor_model_parallel", False)
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(total, group=self.tensor_group)
        norm = total.sqrt().float()
        if norm > grad_clip:
            factor = grad_clip / (norm + 1e-6)
            for param in self.params:
                param.grad.mul_(factor)
        return norm


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors (the norms) are not: Megatron-core's rule, by shape and not by name."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
