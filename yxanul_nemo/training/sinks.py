"""Where records of training go: Lightning loggers, one per configured destination. The step axis of all of them is tokens."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.log import logger as log
from yxanul_nemo.shared_files import open_for_appending

METRICS_NAME = "metrics.jsonl"


def make_sinks(config: RunConfig, resume_tokens: int) -> list[Logger]:
    """The configured loggers of a run that goes on after `resume_tokens`; for the first rank alone."""
    # Steps after the checkpoint are trained again; purge_step keeps them from standing there twice.
    return [JsonlLogger(config.run.dir, resume_tokens), *_others(config, purge_step=resume_tokens + 1)]


def log_validation(config: RunConfig, result: Mapping[str, Any]) -> None:
    """Send a validation result to the configured loggers; it has a file of its own beside `metrics.jsonl`."""
    values = {"validation/mean_bits_per_byte": result["mean_bits_per_byte"]}
    for name, score in result["domains"].items():
        values[f"validation/{name}_bits_per_byte"] = score["bits_per_byte"]
        values[f"validation/{name}_surprise_ratio"] = result["surprise_ratio_bits_per_byte"][name]
    with disk_errors(config.run.dir, "logging a validation"):
        for sink in _others(config):
            sink.log_metrics(values, step=result["tokens_total"])
            sink.finalize("success")


def _others(config: RunConfig, purge_step: int | None = None) -> list[Logger]:
    sinks: list[Logger] = []
    if config.logging.tensorboard:
        sinks.append(TensorBoardLogger(config.run.dir, name="tensorboard", version="", purge_step=purge_step))
    if config.logging.wandb or config.logging.mlflow:
        # Their packages are optional.
        from yxanul_nemo.training.trackers import make_trackers

        sinks += make_trackers(config)
    return sinks


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
        with disk_errors(self.path, "writing metrics"), open_for_appending(self.path) as handle:
            handle.write((json.dumps({"tokens_total": step, **finite}) + "\n").encode())

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml already."""

    @rank_zero_only
    def _drop_after(self, tokens: int) -> None:
        with disk_errors(self.path, "reading metrics"):
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
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
            return line.endswith("\n") and parse_json(line)["tokens_total"] <= tokens
        except (ValueError, KeyError, TypeError):
            return False
