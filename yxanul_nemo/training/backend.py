"""Interface between training and the device it runs on."""

import gc
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

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


class Backend(ABC):
    """One rank's model and optimizer on one kind of device."""

    model: YxanulGPT
    guard: UpdateGuard

    @abstractmethod
    def train_step(
        self,
        ids_ABT: Tensor,
        labels_ABT: Tensor,
        lr: float,
        grad_clip: float,
        in_bf16: bool = False,
        begins_fp8: bool = False,
    ) -> StepResult:
        """Do one optimizer step over this rank's accumulated micro-batches [accumulation, micro_batch_size, seq_len].

        Args:
            ids_ABT: on the host as it was read, so that nothing waits for the device.
            labels_ABT: the token after each, likewise.
            in_bf16: leave FP8 out of this step, where the precision has it.
            begins_fp8: FP8 takes over from BF16 at this step: take its delayed scales from this batch first.
        """

    @abstractmethod
    def sharded_state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs to go on bit by bit, as Megatron-core's sharded tensors over live storage."""

    @abstractmethod
    def after_load(self, lacks_fp8_scales: bool = False) -> None:
        """Bring what is derived from the state in line with it, after the tensors of `sharded_state` were overwritten by a checkpoint's.

        Args:
            lacks_fp8_scales: the checkpoint had no FP8 scales for these layers; take them from passes with its weights.
        """

    def close(self) -> None:  # noqa: B027 - a default, not a duty
        """Give back what ranks hold together, before they part. A backend that holds nothing of the kind has nothing to do."""


def forget_backends(device: str) -> None:
    """Free what models hold that nothing refers to any more: FP8 scales are global in Transformer Engine, memory is in torch's cache."""
    gc.collect()
    if device == "cuda":
        forget_fp8_state()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
