"""`conf/report`: what `stage=report` makes of a run."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from yxanul_nemo.config.base import Section


class ReportConfig(Section):
    """The page about a run. It changes nothing in the run."""

    dir: Path | None = None
    """Folder for the page and its charts; unset: `run.dir/report`, for a comparison a folder beside the first run."""
    prompts: list[str] = Field(default=["", "The "])
    """Beginnings that the model of each phase's end continues; an empty one lets it begin by itself, an empty list makes no samples."""
    sample_tokens: int = Field(default=80, ge=1)
    """Most tokens of one sample."""
    temperature: float = Field(default=0.8, ge=0, allow_inf_nan=False)
    """Of sampling; 0 takes the most likely token each time."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where samples are made; a GPU may be at work for the run itself."""
