"""Experiment trackers that live outside the run's folder: Weights & Biases and MLflow, behind Lightning's own loggers.

A tracker must never end a run that it only watches: an error of one is said once, and that one is left out until the next phase.
A run keeps one identity over its phases and restarts, in `<run_dir>/trackers/`.
"""

import netrc
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.log import logger as log

FOLDER = "trackers"
WANDB_HOST = "api.wandb.ai"
WANDB_INIT_SECONDS = 30.0
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Unless the environment says otherwise: by default an unreachable server would hold training up for minutes."""


def make_trackers(config: RunConfig) -> list[Logger]:
    """The trackers that `logging` asks for."""
    trackers: list[Logger] = []
    if config.logging.wandb:
        trackers.append(Tracker("Weights & Biases", lambda: _wandb(config)))
    if config.logging.mlflow:
        trackers.append(Tracker("MLflow", lambda: _mlflow(config)))
    return trackers


class Tracker(Logger):
    """A Lightning logger behind which another one may fail.

    Args:
        title: for the message where it does.
        make: opens the other one; what it raises counts as its failure.
    """

    def __init__(self, title: str, make: Callable[[], Logger]):
        super().__init__()
        self._title, self._failed = title, False
        self._inner = self._attempt(make)

    @property
    def name(self) -> str:
        """Title of the tracker."""
        return self._title

    @property
    def version(self) -> int:
        """Unused; the run's identity is the inner logger's."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass a record on."""
        self._attempt(lambda: self._inner.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration was given when the tracker was opened; Lightning has nothing to add."""

    def finalize(self, status: str) -> None:
        """Send what is left and end the tracker's own processes: a forked worker ends without Python's exit handlers."""
        self._attempt(lambda: self._finish(status))

    def _finish(self, status: str) -> None:
        self._inner.finalize(status)
        if isinstance(self._inner, WandbLogger):
            import wandb

            self._inner.experiment.finish()
            wandb.teardown()

    def _attempt(self, act: Callable[[], Any]) -> Any:
        if self._failed:
            return None
        try:
            return act()
        except Exception as error:  # noqa: BLE001 - a service outside; whatever it raises must not end the training it watches
            self._failed = True
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            log.warning(
                "%s failed (%s); training goes on without it, metrics.jsonl has every record", self._title, reason
            )
            return None


def _wandb(config: RunConfig) -> Logger:
    import wandb

    folder = config.run.dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "wandb_run_id"
    is_new = not known.exists()
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_account() else "offline")
    # Opened here, because Lightning 2.4 gives wandb.init an argument that is gone.
    run = wandb.init(
        project=config.logging.wandb_project,
        name=config.run.name,
        id=_identity(known, lambda: uuid.uuid4().hex[:12]),
        resume="allow",
        dir=folder,
        mode=mode,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True, init_timeout=WANDB_INIT_SECONDS),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if mode == "offline" and is_new:
        log.info("Weights & Biases: no account, kept in %s; `wandb sync` sends it later", folder / "wandb")
    return WandbLogger(experiment=run, save_dir=folder)


def _has_wandb_account() -> bool:
    """As `wandb login` leaves one: a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _mlflow(config: RunConfig) -> Logger:
    for name, value in MLFLOW_PATIENCE.items():
        os.environ.setdefault(name, value)
    folder = config.run.dir / FOLDER
    uri = config.logging.mlflow if isinstance(config.logging.mlflow, str) else os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        # MLflow 3 wants a database unless told that plain files are meant; they need no server and no further packages.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = f"file:{(folder / 'mlflow').resolve()}"
    known = folder / "mlflow_run_id"
    run_id = known.read_text(encoding="utf-8").strip() if known.exists() else None
    tracker = MLFlowLogger("yxanul", config.run.name, tracking_uri=uri, run_id=run_id)
    _identity(known, lambda: str(tracker.run_id))
    if run_id is None:
        # Once: MLflow refuses parameters that change.
        tracker.log_hyperparams(config.model_dump(mode="json"))
    return tracker


def _identity(path: Path, make: Callable[[], str]) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, make())
    return path.read_text(encoding="utf-8").strip()
