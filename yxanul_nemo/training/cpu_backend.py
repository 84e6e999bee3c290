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
from yxanul_nemo.training.backend import StepResult
from yxanul_nemo.training.guard import UpdateGuard
from yxanul_nemo.training.optimizer import MainParamOptimizer


class CpuBackend:
    """One rank's model and optimizer; see `training.backend.Backend` for the contract."""

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

    def prepare(self, micro_batch_size: int, accumulation: int, seq_len: int) -> None:
        """Nothing to warm up."""

    def make_room(self, ids_ABT: Tensor) -> None:
        """A CPU has no lists of documents."""

    def train_step(
        self, ids_ABT: Tensor, labels_ABT: Tensor, lr: float, grad_clip: float, in_bf16: bool = False
    ) -> StepResult:
        """One optimizer step over the accumulated micro-batches of this rank [accumulation, micro_batch_size, seq_len]."""
        assert not in_bf16, "a CPU has no FP8 to leave out"
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

    def calibrate(self, ids_ABT: Tensor, labels_ABT: Tensor) -> None:
        """A CPU has no scales."""

    def seconds_per_micro_batch(self, in_bf16: bool) -> float:
        """A CPU has one number format, so that nothing is to be chosen."""
        raise AssertionError("a CPU has no FP8 to compare with")

    def sharded_state(self) -> dict[str, Any]:
        """Weights, optimizer and guard, as views that a checkpoint's tensors can be copied into."""
        return self.optimizer.sharded_state(self.model.sharded_state_dict()) | self.guard.sharded_state()

    def after_load(self) -> None:
        """Bring what is derived from the loaded state in line with it."""
        self.optimizer.after_load()

    def close(self) -> None:
        """A CPU holds on to nothing."""
