"""What a run has to fetch, and how much text of each source its curriculum takes. Light, and without network."""

from pathlib import Path

from yxanul_nemo.config.data import ASSUMED_CHARS_PER_TOKEN, CHARS_PER_TOKEN
from yxanul_nemo.config.outputs import DomainConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, tokens_per_source
from yxanul_nemo.run_folder import TOKENIZER_RECORD

TEXT_PER_BYTE = {"json": 2.5, "parquet": 1.6}
"""Bytes of text in a byte of a file, to say before fetching how much it will be: C4 as .json.gz, FineWeb-Edu as parquet. Counted
afterwards."""
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


def text_per_byte(files: str) -> float:
    """What to expect of files of this name or pattern (`TEXT_PER_BYTE`)."""
    return TEXT_PER_BYTE["parquet" if files.endswith(".parquet") else "json"]


def absent_domains(config: RunConfig) -> dict[str, tuple[Path, DomainConfig]]:
    """Validation domains whose file is to be fetched: name -> the file, and what it is made from."""
    return {
        name: (config.validation.dir / str(domain.path), domain)
        for name, domain in config.validation.domains.items()
        if domain.hub is not None and not (config.validation.dir / str(domain.path)).is_file()
    }


def lacks_tokenizer(config: RunConfig) -> bool:
    """Whether the tokenizer's files are to be fetched."""
    return config.tokenizer.needs_hub and not (config.run.folder.tokenizer / TOKENIZER_RECORD).is_file()
