"""What happens between steps: records, checkpoints, and stopping when asked to."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from yxanul_nemo.log import logger
from yxanul_nemo.training.agreement import any_rank
from yxanul_nemo.training.module import MAX_SKIPPED_IN_A_ROW, PhaseModule
from yxanul_nemo.training.saving import CheckpointSaver
from yxanul_nemo.training.signals import StopRequest


class BetweenSteps(pl.Callback):
    """After each step of all ranks.

    Every `every_steps` steps, one record to Lightning's loggers and one line to the log; the step axis is tokens. Every
    `every_tokens` tokens, at the end of the phase and on a request to stop, a checkpoint, and a record before it: so the
    records of a resumed run are about each step exactly once.
    """

    def __init__(self, every_steps: int, every_tokens: float, saver: CheckpointSaver, stop: StopRequest):
        self.every_steps, self.every_tokens, self.saver, self.stop = every_steps, every_tokens, saver, stop

    def on_train_start(self, trainer: pl.Trainer, module: PhaseModule) -> None:
        """Start the clock after everything is set up; count tokens from where this process begins."""
        # Lightning 2.4 has put a handler of its own before ours, which ends training with an exception.
        self.stop.install()
        module.meter.restart()
        self._batch_end = time.perf_counter()
        self._saved_at = module.tokens_total

    def on_train_batch_start(self, trainer: pl.Trainer, module: PhaseModule, batch: Any, batch_idx: int) -> None:
        """Time since the last batch was spent waiting for data."""
        module.meter.data_wait_seconds += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: PhaseModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record and save where due."""
        stop, save_failed = any_rank(bool(self.stop), self.saver.failed)
        finished = module.steps_done == module.phase.steps
        saves = finished or stop or module.tokens_total - self._saved_at >= self.every_tokens
        if saves or save_failed:
            self._wait(module, self.saver.wait)
        module.meter.save_seconds += self.saver.written_seconds()
        if saves or module.steps_done % self.every_steps == 0:
            self._record(trainer, module)
        if module.steps_done % min(self.every_steps, MAX_SKIPPED_IN_A_ROW) == 0:
            module.check_skips()
        if saves:
            self._wait(module, lambda: self.saver.start(module.ledger(), phase_end=finished))
            self._saved_at = module.tokens_total
        trainer.should_stop = stop
        self._batch_end = time.perf_counter()

    def _wait(self, module: PhaseModule, act: Callable[[], object]) -> None:
        """Do what belongs to saving; its time is not one of training."""
        began = time.perf_counter()
        act()
        module.meter.pause(time.perf_counter() - began)

    def _record(self, trainer: pl.Trainer, module: PhaseModule) -> None:
        record = module.meter.record() | {
            "phase": module.phase.number,
            "seq_len": module.phase.seq_len,
            "step_in_phase": module.steps_done,
            "learning_rate": module.last_lr,
            "grad_clip": module.phase.grad_clip,
            "time_unix": time.time(),
        }
        for sink in trainer.loggers:
            sink.log_metrics(record, step=module.tokens_total)
        logger.info("%s", _line(module, record))


def _line(module: PhaseModule, record: dict[str, float]) -> str:
    done, planned = module.steps_done, module.phase.steps
    skipped = f" {record['skipped_steps']} skipped" if record["skipped_steps"] else ""
    return (
        f"phase {module.phase.number} seq {module.phase.seq_len:>4} step {done:>5}/{planned} "
        f"loss {record['loss_nats_per_token']:.4f} bpb {record['bits_per_byte']:.4f} lr {record['learning_rate']:.2e} "
        f"norm {record['grad_norm']:.2f} {record['tokens_per_second']:,.0f} tok/s {module.tokens_total:,} tokens{skipped}"
    )
