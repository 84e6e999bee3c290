"""What differs between two configurations, key by key."""

from typing import Any

from yxanul_nemo.config.run import RunConfig

SHAPES = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads", "model.kv_groups", "model.head_dim",
    "model.embedding_rank", "model.vocab_pad_multiple",
)  # fmt: skip
"""Keys that decide the shapes of weights."""
DECISIVE = ("model", "tokenizer", "data", "curriculum", "optim", "precision", "guards")
"""Sections that say something of what is trained."""


def differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Key -> "BEFORE there, NOW here", of the sections that decide what is trained; where tokens and texts lie does not count."""
    old, new = (flat(config.model_dump(mode="json", include=set(DECISIVE))) for config in (before, now))
    found = {}
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key) and key not in ("data.dir", "data.workers"):
            found[key] = f"{old.get(key, 'unset')} there, {new.get(key, 'unset')} here"
    return found


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys as the command line has them."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for name, inner in value.items():
        out |= flat(inner, f"{prefix}.{name}" if prefix else name)
    return out
