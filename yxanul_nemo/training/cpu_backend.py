"""Training on CPUs, with gloo between ranks."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from yxanul_nemo.config.training import GuardsConfig, OptimConfig, ParallelConfig
from yxanul_nemo.model.documents import Documents
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.backend import Backend, StepResult
from yxanul_nemo.training.guard import UpdateGuard
from yxanul_nemo.training.optimizer import MainParamOptimizer


class CpuBackend(Backend):
    """One rank's model and optimizer on CPUs."""

    def __init__(
        self,
        model: YxanulGPT,
        optim: OptimConfig,
        parallel: ParallelConfig | None = None,
        guards: GuardsConfig | None = None,
        documents: Documents | None = None,
    ):
        parallel = parallel or ParallelConfig()
        self.model, self.documents = model, documents
        self.guard = UpdateGuard(guards or GuardsConfig(), torch.device("cpu"))
        self.data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.optimizer = MainParamOptimizer(
            model,
            optim,
            self.data_group,
            parallel.shares_optimizer,
            parallel_state.get_tensor_model_parallel_group(),
        )
        self.flat = self.optimizer.flat

    def train_step(
        self,
        ids_ABT: Tensor,
        labels_ABT: Tensor,
        lr: float,
        grad_clip: float,
        in_bf16: bool = False,
        begins_fp8: bool = False,
    ) -> StepResult:
        """Do one optimizer step; see `Backend.train_step`."""
        assert not (in_bf16 or begins_fp8), "a CPU has no FP8"
        self.model.train()
        self.flat.zero_grads()
        loss_sum = torch.zeros((), dtype=torch.float64)
        scale = 1.0 / (ids_ABT.numel() * self.data_group.size())
        for ids_BT, labels_BT in zip(ids_ABT, labels_ABT, strict=True):
            loss_BT = self.model(ids_BT, labels_BT, self.documents)
            (loss_BT.sum() * scale).backward()
            loss_sum += loss_BT.detach().sum(dtype=torch.float64)
        self.flat.reduce_grads()
        loss = loss_sum * scale
        dist.all_reduce(loss, group=self.data_group)
        norm, applied = self.optimizer.step(lr, grad_clip, partial(self.guard.admits, loss))
        return StepResult(loss=loss, grad_norm=norm, applied=applied)

    def sharded_state(self) -> dict[str, Any]:
        """Return weights, optimizer and guard, as views that a checkpoint's tensors can be copied into."""
        return self.optimizer.sharded_state(self.model.sharded_state_dict()) | self.guard.sharded_state()

    def after_load(self, lacks_fp8_scales: bool = False) -> None:
        """Bring what is derived from the loaded state in line with it."""
        assert not lacks_fp8_scales, "a CPU has no FP8"
        self.optimizer.after_load()
