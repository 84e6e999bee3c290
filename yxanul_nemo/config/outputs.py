"""Sections `checkpoint`, `validation`, `logging` and `export`: what a run leaves behind."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from yxanul_nemo.config.base import PathText, PathValue, Section
from yxanul_nemo.config.data import HubFiles
from yxanul_nemo.config.private_values import require_no_password_in_url, require_no_secrets_in


class CheckpointConfig(Section):
    """When state is committed to disk and what is kept. The end of each phase is always saved and kept."""

    every_tokens: float = Field(default=100e6, gt=0)
    """Tokens between two checkpoints inside a phase."""
    keep_latest: int = Field(default=3, ge=1)
    """Checkpoints kept beside the best one and the ends of phases."""
    keep_phase_ends: bool = True
    """Keep the end of every phase; false: only as one of the latest or the best."""
    asynchronous: bool = True
    """Training waits only until its state is copied into host memory (about 12 bytes per parameter) and goes on while a thread writes it;
    false: it waits for the disk."""
    verify: Literal["full", "size"] = "full"
    """What loading checks against the manifest: SHA-256 of every file, or only their sizes."""


class DomainConfig(Section):
    """Held-out text of one kind."""

    source: str | None = None
    """Name of a data source whose held-out documents are used."""
    path: PathText | None = None
    """A parquet or jsonl file, or a name inside `validation.dir`."""
    template: str = "{text}"
    """How a row's columns become a document, as a Python format string."""
    max_documents: int | None = Field(default=None, ge=1)
    """Use only the first so many documents."""
    for_source: str | None = None
    """Data source whose share `curriculum.adapt_blend` moves by this domain; unset: `source`, or the one of the domain's name."""
    hub: HubFiles | None = None
    """Data set on the Hugging Face hub that `stage=fetch` makes the file `path` from, where it does not exist."""
    hub_rows: int | None = Field(default=None, ge=1)
    """Rows that are taken from it, from its beginning; unset: all."""

    @model_validator(mode="after")
    def _one_origin(self) -> "DomainConfig":
        if (self.source is None) == (self.path is None):
            raise ValueError(
                "set either source (held-out documents of a data source) or path (a parquet or jsonl file)"
            )
        if self.hub is not None and (self.path is None or not self.path.endswith(".parquet")):
            raise ValueError(f"hub needs path, a name that ends with .parquet, not {self.path}")
        return self


class ValidationConfig(Section):
    """Bits per byte on named domains, at one fixed length so that phases compare."""

    domains: dict[str, DomainConfig] = Field(min_length=1)
    """Name -> held-out text."""
    dir: PathValue = Path("validation")
    """Folder in which relative `path`s of domains are looked for."""
    eval_len: int = Field(ge=2)
    """Length of the scoring windows, in tokens."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens by which windows move over a long document; unset: half of `eval_len`."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens scored at once; changes speed and memory, not the result."""
    at_phase_len: bool = True
    """Score a second time at the sequence length of the phase, where that is another one than `eval_len`."""
    every_tokens: float | None = Field(default=None, gt=0)
    """Tokens between two validations inside a phase; unset: only at the end of each phase."""
    every_documents: int | None = Field(default=200, ge=1)
    """Documents of each domain, spread evenly over it, that validations inside a phase score; unset: all."""
    best_metric: str = "mean_bits_per_byte"
    """What the best checkpoint is chosen by: mean_bits_per_byte, or <domain>.bits_per_byte, <domain>.perplexity."""
    early_stop_patience: int | None = Field(default=None, ge=1)
    """End training when so many validations inside phases, one after another, did not improve `best_metric`; unset: never."""
    early_stop_min_improvement: float = Field(default=0.0, ge=0)
    """By how much `best_metric` must fall to count as improved."""

    @model_validator(mode="after")
    def _metric_and_stop_fit(self) -> "ValidationConfig":
        valid = ["mean_bits_per_byte"]
        valid += [f"{name}.{field}" for name in self.domains for field in ("bits_per_byte", "perplexity")]
        if self.best_metric not in valid:
            raise ValueError(f"best_metric={self.best_metric} is none of {', '.join(valid)}")
        if self.early_stop_patience is not None and self.every_tokens is None:
            raise ValueError(
                f"early_stop_patience={self.early_stop_patience} needs every_tokens: it counts validations inside phases"
            )
        return self

    @model_validator(mode="after")
    def _stride_fits(self) -> "ValidationConfig":
        if self.stride is not None and self.stride > self.eval_len:
            raise ValueError(
                f"stride={self.stride} is over eval_len={self.eval_len}; tokens between windows would go unscored"
            )
        return self


class LoggingConfig(Section):
    """What is shown and recorded while training."""

    every_steps: int = Field(default=10, ge=1)
    """Optimizer steps between two records in metrics.jsonl and on the console."""
    tensorboard: bool = True
    """Also write TensorBoard event files, into `run.dir/tensorboard`."""
    wandb: bool = False
    """Also send records to Weights & Biases (needs `uv sync --inexact --extra wandb`); without an account they are kept in
    `run.dir/trackers/wandb` for `wandb sync`."""
    wandb_project: str = "yxanul"
    """Project that a Weights & Biases run belongs to."""
    mlflow: bool | str = False
    """Also send records to MLflow (needs `uv sync --inexact --extra mlflow`): the address of a tracking server, or true for
    MLFLOW_TRACKING_URI or else files in `run.dir/trackers/mlflow`. A name and password go into MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD."""

    @model_validator(mode="after")
    def _address_alone(self) -> "LoggingConfig":
        require_no_password_in_url("mlflow", str(self.mlflow))
        return self


class NotifyConfig(Section):
    """Who is told when a run ends by itself."""

    command: str | None = None
    """Shell command that gets a notice as JSON on its standard input, and YXANUL_EVENT, YXANUL_RUN and YXANUL_MESSAGE as variables, as in
    `'curl -s --json @- "$HOOK"'` with the secret address in the shell's variable HOOK; unset: none. Taken from a recipe or the command
    line alone; no file of a run holds it."""
    events: list[Literal["end", "failure", "preemption"]] = Field(default=["end", "failure", "preemption"])
    """Of a run's tasks: all that was asked for is done; one has failed; a scheduler has stopped it."""

    @model_validator(mode="after")
    def _no_secrets(self) -> "NotifyConfig":
        require_no_secrets_in("command", self.command or "")
        return self


class ExportConfig(Section):
    """The formats a finished model is written in."""

    formats: list[Literal["nemo", "hf", "gguf"]] = Field(default=["nemo", "hf"], min_length=1)
    """`nemo`: NeMo's tar; `hf`: a standard Llama folder; `gguf`: llama.cpp's file (needs `uv sync --inexact --extra gguf`)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the exported weights."""
    checkpoint: str = Field(default="latest", pattern=r"^(latest|best|tokens_[0-9]{15})$")
    """Which checkpoint of the run is exported: latest, best, or the name of its folder."""
    factorized: bool = False
    """`hf` keeps the embedding's two small matrices, with the code that reads them in the folder, instead of a standard Llama."""
    license: str = Field(default="apache-2.0", pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")
    """Licence of the model, for its card, as the hub abbreviates it (apache-2.0, cc-by-nc-4.0, other); the data may ask for another."""
