"""What happens between steps: records, checkpoints, and stopping when asked to."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from yxanul_nemo.log import logger
from yxanul_nemo.training.module import PhaseModule
from yxanul_nemo.training.signals import StopRequest


class Recorder(pl.Callback):
    """Every `every_steps` steps, one record to Lightning's loggers and one line to the log; the step axis is tokens."""

    def __init__(self, every_steps: int, world_size: int):
        self.every_steps, self.world_size = every_steps, world_size
        self._batch_end = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, module: PhaseModule) -> None:
        """Start the clock after everything is set up."""
        module.meter.restart()
        self._batch_end = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: PhaseModule, batch: Any, batch_idx: int) -> None:
        """Time since the last batch was spent waiting for data."""
        module.meter.data_wait_seconds += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: PhaseModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record if it is time to, or if this is the phase's last step."""
        last = module.steps_done == module.phase.steps
        if module.steps_done % self.every_steps == 0 or last:
            record = module.meter.record()
            record |= {
                "phase": module.phase.number,
                "seq_len": module.phase.seq_len,
                "step_in_phase": module.steps_done,
                "learning_rate": module.last_lr,
                "grad_clip": module.phase.grad_clip,
                "time_unix": time.time(),
            }
            for sink in trainer.loggers:
                sink.log_metrics(record, step=module.tokens_total)
            if trainer.is_global_zero:
                logger.info("%s", _line(module, record))
            module.check_skips()
        self._batch_end = time.perf_counter()


class Saver(pl.Callback):
    """A checkpoint every `every_tokens`; on a stop request, a checkpoint at once and the end of training."""

    def __init__(self, save: Callable[[PhaseModule, bool], None], every_tokens: float, stop: StopRequest):
        self.save, self.every_tokens, self.stop = save, every_tokens, stop
        self._saved_at: int | None = None

    def on_train_start(self, trainer: pl.Trainer, module: PhaseModule) -> None:
        """Count from where this process began."""
        self._saved_at = module.tokens_total

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: PhaseModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where due; the end of the phase is always saved."""
        finished = module.steps_done == module.phase.steps
        due = module.tokens_total - self._saved_at >= self.every_tokens
        if finished or due or self.stop:
            self.save(module, finished)
            self._saved_at = module.tokens_total
        if self.stop and not finished:
            trainer.should_stop = True


def _line(module: PhaseModule, record: dict[str, float]) -> str:
    done, planned = module.steps_done, module.phase.steps
    return (
        f"phase {module.phase.number} seq {module.phase.seq_len:>4} step {done:>5}/{planned} "
        f"loss {record['loss_nats_per_token']:.4f} bpb {record['bits_per_byte']:.4f} lr {record['learning_rate']:.2e} "
        f"norm {record['grad_norm']:.2f} {record['tokens_per_second']:,.0f} tok/s {module.tokens_total:,} tokens"
    )
