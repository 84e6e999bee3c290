"""Learning rates and warm-ups that were measured, and what a plan says of a run that is far from them.

The measurements are runs of the 197M model with 30 to 100 million tokens in steps of 32,768 and 65,536 tokens (BENCHMARKS.md,
"Muon and AdamW"). No law is fitted to them: two step sizes and two lengths of run are too few.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import Phase, total_tokens
from yxanul_nemo.curriculum.schedule import warmup_tokens

LIKE_MEASURED_PARAMETERS = (100e6, 400e6)
"""Smallest and largest number of parameters for which the measurements of the 197M model say something."""
FAR = 4
"""A run with more than this many times the tokens, or steps that many times larger, is far from what was measured."""


@dataclass(frozen=True)
class MeasuredRate:
    """What was found for an optimizer."""

    optimizer: str
    best_lr: float
    tried_lr: tuple[float, float]
    """Smallest and largest one that was tried."""
    worse: str
    """What the worst of them lost."""
    fewest_warmup_steps: int
    """Steps of warm-up below which runs were seen to end worse."""
    short_warmup: str
    """What they lost."""


ADAMW = MeasuredRate(
    "AdamW", 1.2e-3, (1.2e-3, 2.4e-3), "2.4e-3 ended 6% worse", 100, "46 steps ended 12% worse than 152"
)
MUON = MeasuredRate(
    "Muon", 2.4e-3, (1.6e-3, 3.6e-3), "1.6e-3 ended 2% worse, 3.6e-3 the same", 27, "fewer than 27 steps were not tried"
)
MOST_TOKENS, MOST_TOKENS_PER_STEP = 100e6, 65_536
"""Longest run and largest step that were measured."""


def rate_warnings(config: RunConfig, phases: Sequence[Phase], parameters: int) -> list[str]:
    """Return a sentence for each of learning rate, warm-up and length that is far from what was measured.

    Args:
        phases: the run's phases, in order.
        parameters: number of the model's parameters.
    """
    if not LIKE_MEASURED_PARAMETERS[0] <= parameters <= LIKE_MEASURED_PARAMETERS[1]:
        return []
    optim, tokens = config.optim, total_tokens(phases)
    measured = ADAMW if optim.muon is None else MUON
    warnings = []
    peak = optim.lr * max(phase.lr_scale for phase in phases)
    low, high = measured.tried_lr[0] / 2, measured.tried_lr[1] * 1.5
    if not low <= peak <= high:
        warnings.append(
            f"optim.lr={optim.lr:g} (at most {peak:g} with lr_scale) is far from {measured.best_lr:g}, the best that was measured for "
            f"{measured.optimizer} with this model; {measured.worse}"
        )
    warmup_steps = _steps_within(phases, warmup_tokens(optim, tokens))
    if warmup_steps < measured.fewest_warmup_steps:
        warnings.append(
            f"optim.warmup_tokens={optim.warmup_tokens:g} is a warm-up of {warmup_steps} steps; with {measured.optimizer} "
            f"{measured.short_warmup}"
        )
    step = max(phase.tokens_per_step for phase in phases)
    if tokens > FAR * MOST_TOKENS or step > FAR * MOST_TOKENS_PER_STEP:
        warnings.append(
            f"learning rates were measured up to {MOST_TOKENS / 1e6:.0f} M tokens and in steps of up to "
            f"{MOST_TOKENS_PER_STEP:,}; the best one for {tokens / 1e6:,.0f} M tokens in steps of {step:,} is not known"
        )
    return warnings


def _steps_within(phases: Sequence[Phase], tokens: float) -> int:
    """Return how many steps from the run's beginning `tokens` are."""
    steps = 0
    for phase in phases:
        if tokens <= phase.first_token:
            break
        steps += int(min(tokens - phase.first_token, phase.steps * phase.tokens_per_step) // phase.tokens_per_step)
    return steps
