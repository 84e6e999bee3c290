"""One meter: what is logged is what was applied, over exactly the steps since the last record."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from yxanul_nemo.training.skips import SkippedUpdate


class StepMeter:
    """Collects steps on their device and turns them into one record; reading tensors happens only in `record`.

    Args:
        bytes_per_token: of the phase's blend, for bits per byte of the training loss.
        flops_per_token: of forward and backward at the phase's length.
    """

    def __init__(self, bytes_per_token: float, flops_per_token: float):
        self.bytes_per_token, self.flops_per_token = bytes_per_token, flops_per_token
        self.skipped_updates: list[SkippedUpdate] = []
        """Those of the interval that was recorded last."""
        self._skipped: Any = 0
        self._skipped_in_a_row: Any = 0
        self.restart()

    @property
    def skipped(self) -> int:
        """Updates skipped since this meter was made."""
        return int(self._skipped)

    @property
    def skipped_in_a_row(self) -> int:
        """Updates skipped up to now without one applied in between."""
        return int(self._skipped_in_a_row)

    def restart(self) -> None:
        """Begin a new interval now."""
        self.began = time.perf_counter()
        self.data_wait_seconds = self.save_wait_seconds = 0.0
        self.save_seconds = 0.0
        """Time that a thread took for a checkpoint that was committed in the interval, while training went on."""
        self.steps = self.tokens = 0
        self.loss_sum: Any = 0.0
        self.applied_sum: Any = 0
        self.grad_norm: Any = 0.0
        self._steps_3: list[Tensor] = []

    def add(self, tokens: int, loss: Tensor, grad_norm: Tensor, applied: Tensor) -> None:
        """One optimizer step; the scalars stay on their device."""
        self.steps += 1
        self.tokens += tokens
        # A skipped step's loss is not a number; it must not hide those of the steps around it.
        self.loss_sum = self.loss_sum + loss.where(applied, 0.0)
        self.applied_sum = self.applied_sum + applied.long()
        self._skipped = self._skipped + (~applied).long()
        self._skipped_in_a_row = (self._skipped_in_a_row + 1) * (~applied).long()
        self.grad_norm = grad_norm
        self._steps_3.append(torch.stack((loss.double(), grad_norm.double(), applied.double())))

    @contextmanager
    def waiting_for_save(self) -> Iterator[None]:
        """Count the time of the block as one of saving, not of training."""
        began = time.perf_counter()
        yield
        self.pause(time.perf_counter() - began)

    def pause(self, seconds: float, validating: bool = False) -> None:
        """Leave out time that was just spent waiting for a checkpoint, which is recorded on its own, or on a validation, which is too."""
        self.began += seconds
        if not validating:
            self.save_wait_seconds += seconds

    def record(self) -> dict[str, float]:
        """Means over the interval's applied steps; the gradient norm is that of the last step. Starts the next interval.

        Speeds are those of training: waiting for a checkpoint is `save_wait_seconds`, in the record after it.
        """
        applied = int(self.applied_sum)
        self.skipped_updates = self._skips() if applied < self.steps else []
        loss = float(self.loss_sum) / applied if applied else math.nan
        grad_norm = float(self.grad_norm)
        seconds = time.perf_counter() - self.began
        values = {
            "loss_nats_per_token": loss,
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "grad_norm": grad_norm,
            "steps": self.steps,
            "skipped_steps": self.steps - applied,
            "tokens_per_second": self.tokens / seconds,
            "model_flops_per_second": self.tokens * self.flops_per_token / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait_share": self.data_wait_seconds / seconds,
            "save_wait_seconds": self.save_wait_seconds,
            "save_seconds": self.save_seconds,
        }
        self.restart()
        return values

    def _skips(self) -> list[SkippedUpdate]:
        steps = torch.stack(self._steps_3).tolist()
        return [
            SkippedUpdate(len(steps) - 1 - i, loss, norm)
            for i, (loss, norm, applied) in enumerate(steps)
            if not applied
        ]
