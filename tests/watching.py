"""Callbacks as a user might write them, which tests name by import path."""

import json
from pathlib import Path
from typing import Any


class Watcher:
    """Writes down each call that it gets, beside the run's other files; asks for a stop after the step named in `stop_after`."""

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self._note(trainer, "on_train_start")

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        self._note(trainer, "on_train_batch_start", batch=list(batch[0].shape), batch_idx=batch_idx)

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note(trainer, "on_train_batch_end", loss=float(outputs.loss), batch_idx=batch_idx)
        stop_after = Path(trainer.config.run.dir / "stop_after")
        if stop_after.exists() and trainer.tokens_total == int(stop_after.read_text()):
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        self._note(trainer, "on_validation_end", score=trainer.callback_metrics["validation/mean_bits_per_byte"])

    def on_save_checkpoint(self, trainer: Any, model: Any, checkpoint: dict[str, Any]) -> None:
        self._note(trainer, "on_save_checkpoint", saved=checkpoint["tokens_total"])

    def on_train_end(self, trainer: Any, model: Any) -> None:
        self._note(trainer, "on_train_end", metrics=sorted(trainer.callback_metrics))

    def _note(self, trainer: Any, hook: str, **facts: Any) -> None:
        with (trainer.config.run.dir / "calls.jsonl").open("a") as handle:
            line = {"hook": hook, "tokens": trainer.tokens_total, "step": trainer.global_step, **facts}
            handle.write(json.dumps(line) + "\n")


class Failing:
    """Fails in its second step."""

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise RuntimeError("what the author did not think of")

    def on_exception(self, trainer: Any, model: Any, exception: BaseException) -> None:
        (trainer.config.run.dir / "heard").write_text(str(exception))


class NeverCalled:
    """Has a hook of Lightning's that the loop lacks."""

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        raise AssertionError


class Hookless:
    pass


def make_watcher() -> Watcher:
    return Watcher()


def make_lightning_callback() -> object:
    """One that is derived from Lightning's base class, as most are."""
    from lightning.pytorch.callbacks import Callback

    class CountSteps(Callback):
        steps = 0

        def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.steps += 1

        def on_train_end(self, trainer: Any, model: Any) -> None:
            (trainer.config.run.dir / "steps").write_text(str(self.steps))

    return CountSteps()


NOT_CALLABLE = 3
