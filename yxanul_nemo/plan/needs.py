"""What a run needs and neither makes nor fetches itself, looked for before anything is spent: data, validation files, packages. Light."""

import importlib.util
from collections.abc import Callable

from data_prep.corpus.find_shards import resolve_shards
from data_prep.corpus.manifest import MANIFEST_NAME
from data_prep.corpus.open_shard import open_shard
from yxanul_nemo.config.outputs import ExportConfig, LoggingConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import selected_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.user_callbacks import check_callbacks
from yxanul_nemo.validation.files import check_domain_files


def require_all(config: RunConfig) -> None:
    """Look for everything that `stage=all` will need; raises one UserError that names all that is missing."""
    missing = missing_needs(config)
    if len(missing) == 1:
        raise missing[0]
    if missing:
        listed = "".join(f"\n  {error}" for error in missing)
        raise UserError(
            config.run.name, f"{len(missing)} things that this run needs are missing", fix=listed.strip("\n")
        )


def missing_needs(config: RunConfig) -> list[UserError]:
    """What each check has to say."""
    checks: list[Callable[[RunConfig], None]] = [
        check_phases,
        check_data,
        lambda run: check_domain_files(run.validation, are_to_come=True),
        lambda run: check_trackers(run.logging),
        lambda run: check_callbacks(run.callbacks),
        lambda run: check_formats(run.export),
    ]
    missing = []
    for check in checks:
        try:
            check(config)
        except UserError as error:
            missing.append(error)
    return missing


def check_phases(config: RunConfig) -> None:
    """Refuse `phases` that the curriculum does not have."""
    selected_phases(config.phases, len(config.curriculum.phases))


def check_data(config: RunConfig) -> None:
    """Refuse sources without shards or without the column, and a prepared corpus without its tokenizer; texts themselves are not read."""
    if (config.data_dir / MANIFEST_NAME).is_file():
        check_tokenizer(config)
        return
    for name, source in config.data.sources.items():
        if source.is_fetched:
            continue
        for shard in resolve_shards(source.files, f"data.sources.{name}.path"):
            with open_shard(shard, source.text_column, source.ids_column):
                pass
    path = config.tokenizer.path
    if path is not None and not path.exists() and not config.run.folder.tokenizer.exists():
        raise UserError("tokenizer.path", f"{path} does not exist", "a folder or file with a tokenizer")


def check_tokenizer(config: RunConfig) -> None:
    """Refuse a prepared corpus whose tokenizer the run's folder lacks, as where `data.dir` is another run's."""
    folder = config.run.folder.tokenizer
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            folder,
            "does not exist, though the tokens are prepared",
            "the tokenizer that they were made with",
            "stage=data with the same recipe makes or copies it, and prepares nothing anew.",
        )


def check_trackers(config: LoggingConfig) -> None:
    """Refuse a tracker whose package is not installed."""
    for key, asked in (("wandb", config.wandb), ("mlflow", config.mlflow)):
        if asked and importlib.util.find_spec(key) is None:
            raise UserError(
                f"logging.{key}",
                f"is {asked}, but the package {key} is not installed",
                fix=f"Run `uv sync --inexact --extra {key}`, or set logging.{key}=false.",
            )


def check_formats(config: ExportConfig) -> None:
    """Refuse a format whose package is not installed."""
    if "gguf" in config.formats and importlib.util.find_spec("gguf") is None:
        raise UserError(
            "export.formats",
            "has gguf, but the package gguf is not installed",
            fix="Run `uv sync --inexact --extra gguf`, or leave gguf out.",
        )
