"""Everything that a run's folder says about the run, read without changing it; a run under way or crashed says less."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus.manifest import MANIFEST_NAME, CorpusManifest, load_manifest
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import Phase, plan_phases, total_tokens
from yxanul_nemo.errors import UserError
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.plan.plan import Plan, make_plan
from yxanul_nemo.plan.progress import PhaseDone, phases_done
from yxanul_nemo.run_folder import RunFolder

COLUMNS = (
    "tokens_total", "loss_nats_per_token", "bits_per_byte", "grad_norm", "grad_clip", "learning_rate", "tokens_per_second",
    "mfu", "mfu_peak_flops_per_second", "peak_memory_bytes", "skipped_steps", "steps", "phase", "data_wait_share", "time_unix",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is known of one run."""

    label: str
    run_dir: Path
    config: RunConfig
    phases: list[Phase]
    records: Mapping[str, np.ndarray]
    """Columns of `metrics.jsonl`, one value for each record in the order of tokens; NaN where a record has none."""
    validations: dict[int, dict[str, Any]]
    """Results at the ends of phases, by number."""
    done: dict[int, PhaseDone]
    """Phases that were begun, by number."""
    ledger: Ledger | None
    """Of the newest checkpoint."""
    manifest: CorpusManifest | None
    plan: Plan | None
    plan_note: str
    """Why there is no plan."""
    environment: dict[str, Any]
    exported: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    """Results of `stage=evaluate`, by the names of their files."""

    @property
    def total_tokens(self) -> int:
        """Of the whole curriculum."""
        return total_tokens(self.phases)

    @property
    def trained_tokens(self) -> int:
        """By the newest record or checkpoint."""
        return sum(done.tokens for done in self.done.values())

    @property
    def training_seconds(self) -> float:
        """In training steps, without start-up, saving and validation."""
        return sum(done.training_seconds or 0.0 for done in self.done.values())

    @property
    def is_finished(self) -> bool:
        """Trained to the end and validated."""
        return self.trained_tokens >= self.total_tokens and len(self.phases) in self.validations

    @property
    def last_validation(self) -> dict[str, Any] | None:
        """The result at the end of the last phase that has one."""
        return self.validations[max(self.validations)] if self.validations else None

    def of_phase(self, number: int, column: str) -> np.ndarray:
        """The finite values of a column in one phase's records."""
        values = self.records[column][self.records["phase"] == number]
        return values[np.isfinite(values)]

    def median(self, number: int, column: str) -> float | None:
        """Of the finite values of a column in one phase; None where there are none."""
        values = self.of_phase(number, column)
        return statistics.median(values.tolist()) if len(values) else None


def read_run(run_dir: Path, label: str | None = None) -> Run:
    """Read a run's folder.

    Raises:
        UserError: it is not the folder of a run that has begun.
    """
    folder = RunFolder(run_dir)
    config = load_run_config(folder.config)
    # The folder may have been moved since.
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})
    phases = plan_phases(config.curriculum)
    newest = CheckpointStore.of_run(config, verify="size").newest_good()
    ledger = newest.read_ledger() if newest else None
    environment = _json(folder.environment) or {}
    plan, plan_note = _plan(config, environment, ledger)
    return Run(
        label=label or run_dir.resolve().name,
        run_dir=run_dir,
        config=config,
        phases=phases,
        records=_records(folder.metrics),
        validations=_validations(folder, phases),
        done=phases_done(folder.metrics, ledger, phases),
        ledger=ledger,
        manifest=load_manifest(config.data_dir) if (config.data_dir / MANIFEST_NAME).is_file() else None,
        plan=plan,
        plan_note=plan_note,
        environment=environment,
        exported=_json(folder.export_record),
        evaluations=_evaluations(folder),
    )


def _plan(config: RunConfig, environment: Mapping[str, Any], ledger: Ledger | None) -> tuple[Plan | None, str]:
    """The plan for the machine that the run was on, which need not be this one."""
    gpus = [str(line).partition(",")[0] for line in environment.get("gpus") or []]
    ranks = ledger.phases[-1].world_size if ledger and ledger.phases else config.plan.gpus
    update: dict[str, Any] = {"gpus": ranks}
    if gpus and config.parallel.device != "cpu":
        update["gpu"] = "auto"
    try:
        return make_plan(config.model_copy(update={"plan": config.plan.model_copy(update=update)}), gpus), ""
    except UserError as error:
        return None, str(error)


def _records(path: Path) -> dict[str, np.ndarray]:
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            row = parse_json(line)
            row["tokens_total"], row["phase"] = int(row["tokens_total"]), int(row["phase"])
        except (ValueError, KeyError, TypeError, OverflowError):
            # A line that is being written just now, or was when the machine went down.
            continue
        # Validations inside phases stand there too.
        if "loss_nats_per_token" in row:
            rows.append(row)
    columns = {}
    for name in COLUMNS:
        values = (row.get(name) for row in rows)
        columns[name] = np.array([v if isinstance(v, int | float) else np.nan for v in values], dtype=np.float64)
    return columns


def _validations(folder: RunFolder, phases: list[Phase]) -> dict[int, dict[str, Any]]:
    found = {phase.number: _json(folder.phase_result(phase.number)) for phase in phases}
    return {number: result for number, result in found.items() if result is not None}


def _evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    found = (_json(path) for path in sorted(folder.evaluation.glob("*.json")))
    # Version 0.1.0 wrote other figures there.
    return [result for result in found if result is not None and "accuracy_above_chance" in result]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
