"""`conf/generate`, `conf/evaluate`: what is done with a trained model."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from yxanul_nemo.config.base import Section


class GenerateConfig(Section):
    """`stage=generate`: how `prompt` is continued."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens to write; fewer if the document or the model's context ends."""
    temperature: float = Field(default=0.8, ge=0, allow_inf_nan=False)
    """0 takes the most likely token each time; 1 samples from the model's own probabilities."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample only among the most likely tokens that together have this probability."""
    seed: int = 0
    """The same seed gives the same text on the same machine."""
    checkpoint: Literal["best", "latest"] = "best"
    """Which checkpoint of a run; best: the newest where none is marked."""


class EvaluateConfig(Section):
    """`stage=evaluate`: what a model is tried at."""

    tasks: list[Literal["choice", "cloze", "gsm8k", "humaneval"]] = Field(default=["choice", "cloze"])
    """`choice`, `cloze`: made of the validation domains' text, scored by likelihood; `gsm8k`, `humaneval`: by generation, pass@1."""
    items_per_domain: int = Field(default=200, ge=1)
    """Most questions that choice and cloze make of one domain."""
    problems: int | None = Field(default=None, ge=1)
    """Use only the first so many problems of gsm8k and humaneval; unset: all."""
    gsm8k_path: Path = Path("gsm8k_validation.parquet")
    """File with the columns question and answer, or its name in `validation.dir`."""
    humaneval_path: Path = Path("humaneval_validation.parquet")
    """File with the columns prompt, test and entry_point, or its name in `validation.dir`."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer of gsm8k and humaneval."""
    run_generated_code: bool = False
    """Run what the model wrote for humaneval, in a process with limits; without it humaneval is refused."""
    time_limit_seconds: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """For one program."""
    memory_limit_mib: int = Field(default=512, ge=64)
    """For one program."""
    harness_tasks: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness, by its names (`uv run --with 'lm-eval[hf]' python launcher.py stage=evaluate`); each fetches its
    own data."""
    harness_folder: Path | None = None
    """Folder with tasks of one's own for it (YAML)."""
    seed: int = 0
    """Of the questions that choice and cloze make."""

    @model_validator(mode="after")
    def _code_may_run(self) -> "EvaluateConfig":
        if "humaneval" in self.tasks and not self.run_generated_code:
            raise ValueError(
                "tasks has humaneval, which runs what the model wrote; allow it with run_generated_code=true"
            )
        return self
