"""What happens between steps: records, checkpoints, and stopping when asked to."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from yxanul_nemo.training.agreement import any_rank
from yxanul_nemo.training.module import MAX_SKIPPED_IN_A_ROW, PhaseModule
from yxanul_nemo.training.records import Recorder
from yxanul_nemo.training.signals import StopRequest


class BetweenSteps(pl.Callback):
    """After each step of all ranks.

    Every `every_steps` steps, one record to Lightning's loggers and one line to the log; the step axis is tokens. Every
    `every_tokens` tokens, at the end of the phase and on a request to stop, a checkpoint, and a record before it: so the
    records of a resumed run are about each step exactly once.
    """

    def __init__(
        self,
        every_steps: int,
        every_tokens: float,
        save: Callable[[PhaseModule, bool], None],
        stop: StopRequest,
        recorder: Recorder,
    ):
        self.every_steps, self.every_tokens, self.save, self.stop = every_steps, every_tokens, save, stop
        self.recorder = recorder

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
        stop = any_rank(bool(self.stop))
        finished = module.steps_done == module.phase.steps
        saves = finished or stop or module.tokens_total - self._saved_at >= self.every_tokens
        if saves or module.steps_done % self.every_steps == 0:
            self.recorder.record(trainer.loggers, module)
        if module.steps_done % min(self.every_steps, MAX_SKIPPED_IN_A_ROW) == 0:
            module.check_skips()
        if saves:
            began = time.perf_counter()
            self.save(module, finished)
            module.meter.pause(time.perf_counter() - began)
            self._saved_at = module.tokens_total
        trainer.should_stop = stop
        self._batch_end = time.perf_counter()
