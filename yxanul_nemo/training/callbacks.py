"""What happens between steps: records, checkpoints, and stopping when asked to."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.machine.agreement import any_rank_each
from yxanul_nemo.training.module import PhaseModule
from yxanul_nemo.training.records import Recorder
from yxanul_nemo.training.saving import CheckpointSaver
from yxanul_nemo.training.signals import StopRequest
from yxanul_nemo.training.watchdog import Watchdog

SKIPS_NAME = "skipped_updates"
"""Folder in the run's for what was trained on when updates were skipped until the run stopped."""


class BetweenSteps(pl.Callback):
    """After each step of all ranks.

    Every `logging.every_steps` steps, one record to Lightning's loggers and one line to the log; the step axis is tokens. Every
    `checkpoint.every_tokens` tokens, at the end of the phase and on a request to stop, a checkpoint, and a record before it: so the
    records of a resumed run are about each step exactly once.
    """

    def __init__(
        self, config: RunConfig, saver: CheckpointSaver, stop: StopRequest, watchdog: Watchdog, recorder: Recorder
    ):
        self.every_steps, self.every_tokens = config.logging.every_steps, config.checkpoint.every_tokens
        self.allowed_skips, self.skips_dir = config.guards.max_skips_in_a_row, config.run.dir / SKIPS_NAME
        self.saver, self.stop, self.watchdog, self.recorder = saver, stop, watchdog, recorder

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
        stop, save_failed = any_rank_each(bool(self.stop), self.saver.failed)
        finished = module.steps_done == module.phase.steps
        saves = finished or stop or module.tokens_total - self._saved_at >= self.every_tokens
        if save_failed:
            self.saver.wait()
        if saves or module.steps_done % self.every_steps == 0:
            # Before anything waits: a GPU goes on with its queue meanwhile, and that time is training.
            self.recorder.record(trainer.loggers, module)
        if saves:
            self._wait(module, self.saver.wait)
        module.meter.save_seconds += self.saver.written_seconds()
        if module.steps_done % min(self.every_steps, self.allowed_skips) == 0:
            module.check_skips(self.allowed_skips, self.skips_dir)
        if saves:
            self._wait(module, lambda: self.saver.start(module.ledger(), phase_end=finished))
            self._saved_at = module.tokens_total
        trainer.should_stop = stop
        self.watchdog.step_done()
        self._batch_end = time.perf_counter()

    def _wait(self, module: PhaseModule, act: Callable[[], object]) -> None:
        """Do what belongs to saving; its time is not one of training."""
        began = time.perf_counter()
        act()
        module.meter.pause(time.perf_counter() - began)
