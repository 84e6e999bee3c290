"""One meter: what is logged is what was applied, over exactly the steps since the last record."""

import json
import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.log import logger as log

METRICS_NAME = "metrics.jsonl"


class StepMeter:
    """Collects steps on their device and turns them into one record; reading tensors happens only in `record`.

    Args:
        bytes_per_token: of the phase's blend, for bits per byte of the training loss.
        flops_per_token: of forward and backward at the phase's length.
    """

    def __init__(self, bytes_per_token: float, flops_per_token: float):
        self.bytes_per_token, self.flops_per_token = bytes_per_token, flops_per_token
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
        self.data_wait_seconds = self.save_seconds = 0.0
        self.steps = self.tokens = 0
        self.loss_sum: Any = 0.0
        self.applied_sum: Any = 0
        self.grad_norm: Any = 0.0

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

    def pause(self, seconds: float, validating: bool = False) -> None:
        """Leave out time that was just spent on a checkpoint, which is recorded on its own, or on a validation, which is too."""
        self.began += seconds
        if not validating:
            self.save_seconds += seconds

    def record(self) -> dict[str, float]:
        """Means over the interval's applied steps; the gradient norm is that of the last step. Starts the next interval.

        Speeds are those of training: waiting for a checkpoint is `save_seconds`, in the record after it.
        """
        applied = int(self.applied_sum)
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
            "save_seconds": self.save_seconds,
        }
        self.restart()
        return values


class JsonlLogger(Logger):
    """Lightning logger that appends one JSON object per record to `<run_dir>/metrics.jsonl`.

    A resumed run first drops the records after its checkpoint: those steps are trained again and would stand there twice.
    """

    def __init__(self, run_dir: Path, resume_tokens: int):
        super().__init__()
        self.path = run_dir / METRICS_NAME
        self._drop_after(resume_tokens)

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> int:
        """Format version."""
        return 1

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file written to."""
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a record."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with disk_errors(self.path, "writing metrics"), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"tokens_total": step, **finite}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml already."""

    @rank_zero_only
    def _drop_after(self, tokens: int) -> None:
        with disk_errors(self.path, "reading metrics"):
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if self._is_record_until(line, tokens)]
        if len(kept) < len(lines):
            log.info("dropping %d metrics records after %s tokens", len(lines) - len(kept), f"{tokens:,}")
            with disk_errors(self.path, "writing metrics"):
                write_text_atomic(self.path, "".join(kept))

    @staticmethod
    def _is_record_until(line: str, tokens: int) -> bool:
        """False also for what a crash has left of a line."""
        try:
            return line.endswith("\n") and json.loads(line)["tokens_total"] <= tokens
        except (ValueError, KeyError, TypeError):
            return False
