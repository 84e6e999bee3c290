"""The learning rate as a pure function of consumed tokens."""

import math

from yxanul_nemo.config.training import OptimConfig


def warmup_tokens(optim: OptimConfig, total_tokens: int) -> float:
    """Length of the warm-up in tokens; a setting below 1 is a share of the run."""
    return optim.warmup_tokens * total_tokens if optim.warmup_tokens < 1 else optim.warmup_tokens


def learning_rate(optim: OptimConfig, tokens: int, total_tokens: int, lr_scale: float = 1.0) -> float:
    """Learning rate of the step with which `tokens` of the run's `total_tokens` are consumed.

    Linear warm-up from 0, then the decay named in `optim.decay` down to `min_lr_ratio` of the peak at the end of the run,
    all multiplied by the phase's `lr_scale`.
    """
    warmup = warmup_tokens(optim, total_tokens)
    if tokens < warmup:
        return optim.lr * lr_scale * tokens / warmup
    done = min(1.0, (tokens - warmup) / max(1.0, total_tokens - warmup))
    if optim.decay == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * done))
    elif optim.decay == "linear":
        height = 1 - done
    elif optim.decay == "wsd":
        height = min(1.0, (1 - done) / optim.wsd_decay_ratio)
    else:
        height = 1.0
    floor = optim.min_lr_ratio if optim.decay != "constant" else 1.0
    return optim.lr * lr_scale * (floor + (1 - floor) * height)
