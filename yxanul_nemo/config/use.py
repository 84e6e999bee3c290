"""`conf/generate`, `conf/evaluate`: what is done with a trained model."""

from typing import Literal

from pydantic import Field

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
