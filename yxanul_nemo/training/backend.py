"""Interface between training and the device it runs on."""

import gc
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from yxanul_nemo.model.fp8_state import forget_fp8_state
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.training.guard import UpdateGuard


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Tensors stay on their device, so that reading them is the caller's choice."""

    loss: Tensor
    """Mean loss over all tokens of the step and all ranks, nats per token, scalar."""
    grad_norm: Tensor
    """Norm of the gradient before clipping, scalar."""
    applied: Tensor
    """False if the guard skipped the update, scalar."""


class Backend(Protocol):
    """One rank's model and optimizer on one kind of device."""

    model: YxanulGPT
    guard: UpdateGuard

    def prepare(self, micro_batch_size: int, accumulation: int, seq_len: int) -> None:
        """Warm up for this shape (a CUDA graph is captured here). Called once, before a checkpoint's state is loaded."""

    def make_room(self, ids_ABT: Tensor) -> None:
        """Called with every step's token ids while they are still on the host: where documents are masked and listed for a CUDA graph,
        there must be room for them all."""

    def train_step(
        self, ids_ABT: Tensor, labels_ABT: Tensor, lr: float, grad_clip: float, in_bf16: bool = False
    ) -> StepResult:
        """One optimizer step over accumulated micro-batches [accumulation, micro_batch_size, seq_len].

        Args:
            in_bf16: leave FP8 out of this step, where the precision has it.
        """

    def calibrate(self, ids_ABT: Tensor, labels_ABT: Tensor) -> None:
        """Take FP8's delayed scales from a batch, without an update: for the step at which FP8 takes over from BF16."""

    def seconds_per_micro_batch(self, in_bf16: bool) -> float:
        """Median time of forward and backward of a prepared micro-batch; infinite if memory runs out. Changes no state of the training.

        Called between `prepare` and the first step, where there is a choice (`precision=auto`).
        """

    def sharded_state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit by bit, as Megatron-core's sharded tensors over live storage."""

    def after_load(self) -> None:
        """Called when the tensors of `sharded_state` have been overwritten by a checkpoint's."""

    def close(self) -> None:
        """The end of training; must be called before ranks part."""


def forget_backends(device: str) -> None:
    """Free what models hold that nothing refers to any more: FP8 scales are global in Transformer Engine, memory is in torch's cache."""
    gc.collect()
    if device == "cuda":
        forget_fp8_state()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
