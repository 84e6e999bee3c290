"""The Lightning module of one phase: each batch is one whole optimizer step, everything else is a function of tokens."""

import math
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor

from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.config.training import OptimConfig
from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.curriculum.schedule import learning_rate
from yxanul_nemo.data.windows import PhaseWindows
from yxanul_nemo.errors import UserError
from yxanul_nemo.training.backend import Backend
from yxanul_nemo.training.metrics import StepMeter
from yxanul_nemo.training.skips import skip_report_path, write_skip_report


class PhaseModule(pl.LightningModule):
    """Args: ledger as it stands at the first step trained here; `total_tokens` of the whole curriculum, for the schedule."""

    def __init__(
        self,
        backend: Backend,
        phase: Phase,
        windows: PhaseWindows,
        source_names: tuple[str, ...],
        ledger: Ledger,
        optim: OptimConfig,
        total_tokens: int,
        meter: StepMeter,
        bf16_first_tokens: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        # Lightning must not move, save or wrap the model: the backend owns it.
        self._backend = [backend]
        self.phase, self.windows, self.source_names, self.optim = phase, windows, source_names, optim
        self.total_tokens, self.meter, self.bf16_first_tokens = total_tokens, meter, bf16_first_tokens
        self.start_ledger = ledger
        self.steps_done = ledger.phase_tokens // phase.tokens_per_step
        self.last_lr = 0.0

    @property
    def backend(self) -> Backend:
        """The model and optimizer."""
        return self._backend[0]

    @property
    def tokens_total(self) -> int:
        """Tokens consumed by the run so far."""
        return self.phase.first_token + self.steps_done * self.phase.tokens_per_step

    @property
    def _first_fp8_step(self) -> int:
        """Step of this phase at which FP8 takes over from BF16, also where a checkpoint lies right before it; 0 in later phases."""
        return max(0, math.ceil((self.bf16_first_tokens - self.phase.first_token) / self.phase.tokens_per_step))

    def ledger(self) -> Ledger:
        """The ledger after the steps done so far."""
        before = self.start_ledger.phase_tokens // self.phase.tokens_per_step
        per_step = self.phase.windows_per_step
        taken_before = self.windows.tokens_per_source(before * per_step)
        taken_now = self.windows.tokens_per_source(self.steps_done * per_step)
        per_source = {
            name: now - then
            for name, now, then in zip(self.source_names, taken_now, taken_before, strict=True)
            if now > then
        }
        tokens = (self.steps_done - before) * self.phase.tokens_per_step
        return self.start_ledger.consume(tokens, per_source, skipped_steps=self.meter.skipped)

    def on_before_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """The step's batch, right before it goes to the device."""
        self.backend.make_room(batch[0])
        return batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """One optimizer step on (ids_ABT, labels_ABT)."""
        ids_ABT, labels_ABT = batch
        after = self.tokens_total + self.phase.tokens_per_step
        self.last_lr = learning_rate(self.optim, after, self.total_tokens, self.phase.lr_scale)
        in_bf16 = self.tokens_total < self.bf16_first_tokens
        if self.bf16_first_tokens and self.steps_done == self._first_fp8_step:
            self.backend.calibrate(ids_ABT, labels_ABT)
        result = self.backend.train_step(ids_ABT, labels_ABT, self.last_lr, self.phase.grad_clip, in_bf16=in_bf16)
        self.meter.add(self.phase.tokens_per_step, result.loss, result.grad_norm, result.applied)
        self.steps_done += 1

    def configure_optimizers(self) -> None:
        """The backend has the optimizer."""

    def check_skips(self, allowed_in_a_row: int, report_folder: Path) -> None:
        """Stop a run whose updates are all skipped; reads the device, so it is called only where that is done anyway.

        Raises:
            UserError: `allowed_in_a_row` or more were skipped up to now; names a file in `report_folder`, which the first rank writes.
        """
        in_a_row = self.meter.skipped_in_a_row
        if in_a_row < allowed_in_a_row:
            return
        steps = (self.steps_done - in_a_row + 1, self.steps_done)
        path = skip_report_path(report_folder, self.phase, *steps)
        if dist.get_rank() == 0:
            write_skip_report(path, self.phase, self.windows, self.source_names, *steps)
        raise UserError(
            f"phase {self.phase.number}",
            f"{in_a_row} updates in a row were skipped (steps {steps[0]}-{steps[1]} of the phase), because loss or gradient were "
            "not finite or, with guards.spike_sigma, spikes",
            "training that converges",
            f"What these steps were trained on is in {path}. Lower optim.lr or the phase's lr_scale, or train in a wider precision; "
            "the newest checkpoint holds the weights as they are, older ones those from before.",
        )
