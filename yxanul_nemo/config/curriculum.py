"""`conf/curriculum`: phases, each a stretch of training at one sequence length, measured in tokens."""

import itertools
import math

from pydantic import Field, model_validator

from yxanul_nemo.config.base import Section


class PhaseConfig(Section):
    """One phase: one process, one static shape."""

    tokens: int = Field(ge=1)
    """Tokens to train on; rounded to whole steps of `tokens_per_step`."""
    seq_len: int = Field(ge=1)
    """Length of the windows, in tokens."""
    tokens_per_step: int = Field(ge=1)
    """Tokens in one optimizer step, over all GPUs and all accumulated micro-batches."""
    lr_scale: float = Field(default=1.0, gt=0)
    """Factor on the learning-rate schedule during this phase."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; above it the gradient is scaled down."""
    blend: dict[str, float] | None = None
    """Share of each source in the tokens of this phase; unset: the curriculum's `blend`."""
    description: str = ""
    """What this phase is for."""

    @model_validator(mode="after")
    def _whole_windows(self) -> "PhaseConfig":
        if self.tokens_per_step % self.seq_len:
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of seq_len={self.seq_len}; "
                "a step must hold whole windows"
            )
        return self


class CurriculumConfig(Section):
    """The phases in order, and the schedule that runs over all of them."""

    name: str
    """Name for people."""
    phases: list[PhaseConfig] = Field(min_length=1)
    """In training order, sequence lengths never falling."""
    total_tokens: float | None = Field(default=None, gt=0)
    """Scale all phases to this total, keeping their shares; unset: the phases' own sum."""
    blend: dict[str, float] | None = None
    """Share of each source where a phase sets none; unset: all sources in proportion to their size."""
    adapt_blend: bool = False
    """Multiply each phase's shares by the surprise ratios (bits per byte) of the validation before it, within `adapt_blend_bounds`."""
    adapt_blend_bounds: list[float] = Field(default=[0.8, 1.25], min_length=2, max_length=2)
    """Smallest and largest factor by which `adapt_blend` moves a configured share, before shares are made to add up to 1."""

    @model_validator(mode="after")
    def _bounds_hold_one(self) -> "CurriculumConfig":
        low, high = self.adapt_blend_bounds
        if not 0 < low <= 1 <= high < math.inf:
            raise ValueError(
                f"adapt_blend_bounds={[low, high]}: the first must be above 0 and at most 1, the second at least 1"
            )
        return self

    @model_validator(mode="after")
    def _lengths_rise(self) -> "CurriculumConfig":
        lengths = [phase.seq_len for phase in self.phases]
        for number, (before, after) in enumerate(itertools.pairwise(lengths), start=2):
            if after < before:
                raise ValueError(
                    f"phase {number}: seq_len={after} is below that of the phase before it ({before}); lengths must not fall"
                )
        return self
