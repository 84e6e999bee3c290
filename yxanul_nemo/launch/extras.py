"""Optional packages that a configuration asks for, looked for before anything is spent."""

import importlib.util

from yxanul_nemo.config.outputs import LoggingConfig
from yxanul_nemo.errors import UserError


def check_trackers(config: LoggingConfig) -> None:
    """Refuse a tracker whose package is not installed."""
    for key, asked in (("wandb", config.wandb), ("mlflow", config.mlflow)):
        if asked and importlib.util.find_spec(key) is None:
            raise UserError(
                f"logging.{key}",
                f"is {asked}, but the package {key} is not installed",
                fix=f"Run `uv sync --extra {key}`, or set logging.{key}=false.",
            )
