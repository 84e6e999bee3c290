"""How much text of each source a curriculum takes."""

from yxanul_nemo.config.data import ASSUMED_CHARS_PER_TOKEN, CHARS_PER_TOKEN
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, tokens_per_source

RESERVE = 1.1
"""Text beyond what is expected to be needed: the characters of a token differ from text to text."""


def text_bytes_needed(config: RunConfig) -> dict[str, int]:
    """Bytes of text of each source for one pass. Shares that depend on the sources' sizes are taken for equal."""
    bounds = config.curriculum.adapt_blend_bounds if config.curriculum.adapt_blend else None
    equal = dict.fromkeys(config.data.source_names, 1)
    tokens = tokens_per_source(plan_phases(config.curriculum), equal, bounds)
    per_token = CHARS_PER_TOKEN.get(config.tokenizer.name, ASSUMED_CHARS_PER_TOKEN)
    factor = per_token * RESERVE / (1 - config.data.heldout_fraction)
    return {name: round(count * factor) for name, count in tokens.items()}
