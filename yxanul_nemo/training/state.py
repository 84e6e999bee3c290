"""A phase while it is trained: what the loop counts, and what callbacks are given as their trainer."""

import math
from collections.abc import Sequence

import torch.distributed as dist
from lightning.pytorch.loggers.logger import Logger

from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import Phase, total_tokens
from yxanul_nemo.curriculum.schedule import learning_rate
from yxanul_nemo.errors import UserError
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.training.backend import StepResult
from yxanul_nemo.training.metrics import StepMeter
from yxanul_nemo.training.prepare import PreparedPhase
from yxanul_nemo.training.signals import StopRequest
from yxanul_nemo.training.skips import skip_report_path, write_skip_report
from yxanul_nemo.user_callbacks import UserCallbacks

SKIPS_NAME = "skipped_updates"
"""Folder in the run's for what was trained on when updates were skipped until the run stopped."""


class TrainingState:
    """How far a phase has come. Everything but the number of steps is a function of tokens.

    A callback gets it as `trainer`. It may read `config`, `phase`, `steps_done`, `tokens_total`, `global_step`, `last_lr`, `loggers`,
    `callback_metrics` and `is_global_zero`, and set `should_stop`.
    """

    def __init__(self, prepared: PreparedPhase, stop: StopRequest, callbacks: Sequence[object] = ()):
        self.prepared, self.stop = prepared, stop
        self.config: RunConfig = prepared.config
        self.phase: Phase = prepared.phase
        self.steps_done = prepared.first_step
        """Optimizer steps of the phase that are done."""
        self.last_lr = 0.0
        self.meter = StepMeter(
            prepared.bytes_per_token,
            training_flops_per_token(self.config.model, prepared.manifest.vocab_size, self.phase.seq_len),
        )
        self.loggers: list[Logger] = []
        """Lightning's loggers; none but on the first rank, and none while nothing is trained."""
        self.callback_metrics: dict[str, float] = {}
        """The newest value of each figure that was recorded, by its name in metrics.jsonl."""
        self.is_global_zero = dist.get_rank() == 0
        self._callbacks = UserCallbacks(callbacks)

    @property
    def tokens_total(self) -> int:
        """Tokens consumed by the run so far."""
        return self.phase.first_token + self.steps_done * self.phase.tokens_per_step

    @property
    def global_step(self) -> int:
        """Optimizer steps of the run, earlier phases included."""
        return sum(phase.steps for phase in self.prepared.phases[: self.phase.number - 1]) + self.steps_done

    @property
    def is_finished(self) -> bool:
        """Whether all steps of the phase are done."""
        return self.steps_done == self.phase.steps

    @property
    def should_stop(self) -> bool:
        """Whether training ends after this step, with its state saved."""
        return bool(self.stop)

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value and not self.stop:
            self.stop.reason = "a callback"

    def call(self, hook: str, *arguments: object) -> None:
        """Call that method of all callbacks with this state, the model and the arguments."""
        self._callbacks.call(hook, self, self.prepared.backend.model, *arguments)

    def next_learning_rate(self) -> float:
        """Return the learning rate of the next step, which is a function of the tokens after it."""
        after = self.tokens_total + self.phase.tokens_per_step
        return learning_rate(self.config.optim, after, total_tokens(self.prepared.phases), self.phase.lr_scale)

    @property
    def is_in_bf16(self) -> bool:
        """Whether the next step leaves FP8 out."""
        return self.tokens_total < self.config.precision.bf16_first_tokens

    @property
    def begins_fp8(self) -> bool:
        """Whether FP8 takes over from BF16 at the next step, also where a checkpoint lies right before it."""
        bf16_tokens = self.config.precision.bf16_first_tokens
        # In later phases this is step 0.
        first_step = max(0, math.ceil((bf16_tokens - self.phase.first_token) / self.phase.tokens_per_step))
        return bf16_tokens > 0 and self.steps_done == first_step

    def count_step(self, lr: float, result: StepResult) -> None:
        """Count an optimizer step that was done."""
        self.last_lr = lr
        self.meter.add(self.phase.tokens_per_step, result.loss, result.grad_norm, result.applied)
        self.steps_done += 1

    def ledger(self) -> Ledger:
        """Return the ledger after the steps done so far."""
        windows, names = self.prepared.windows, self.config.data.source_names
        before, per_step = self.prepared.first_step, self.phase.windows_per_step
        taken_before = windows.tokens_per_source(before * per_step)
        taken_now = windows.tokens_per_source(self.steps_done * per_step)
        per_source = {
            name: now - then for name, now, then in zip(names, taken_now, taken_before, strict=True) if now > then
        }
        tokens = (self.steps_done - before) * self.phase.tokens_per_step
        return self.prepared.ledger.consume(tokens, per_source, skipped_steps=self.meter.skipped)

    def check_skips(self) -> None:
        """Stop a run whose updates are all skipped. Looks every `logging.every_steps` steps, because it waits for the device.

        Raises:
            UserError: `guards.max_skips_in_a_row` or more were skipped up to now; names a file, which the first rank writes.
        """
        most = self.config.guards.max_skips_in_a_row
        if self.steps_done % min(self.config.logging.every_steps, most) or self.meter.skipped_in_a_row < most:
            return
        in_a_row = self.meter.skipped_in_a_row
        steps = (self.steps_done - in_a_row + 1, self.steps_done)
        path = skip_report_path(self.config.run.dir / SKIPS_NAME, self.phase, *steps)
        if self.is_global_zero:
            write_skip_report(path, self.phase, self.prepared.windows, self.config.data.source_names, *steps)
        raise UserError(
            f"phase {self.phase.number}",
            f"{in_a_row} updates in a row were skipped (steps {steps[0]}-{steps[1]} of the phase), because loss or gradient were "
            "not finite or, with guards.spike_sigma, spikes",
            "training that converges",
            f"What these steps were trained on is in {path}. Lower optim.lr or the phase's lr_scale, or train in a wider precision; "
            "the newest checkpoint holds the weights as they are, older ones those from before.",
        )
