"""What a run has to fetch, and how much text of each source its curriculum takes. Light, and without network."""

from pathlib import Path

from data_prep.corpus.manifest import MANIFEST_NAME
from yxanul_nemo.config.data import ASSUMED_CHARS_PER_TOKEN, CHARS_PER_TOKEN
from yxanul_nemo.config.outputs import DomainConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, tokens_per_source
from yxanul_nemo.figures import size
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


def what_comes(config: RunConfig) -> list[str]:
    """What `stage=fetch` will get for this run, in one line with licences and sizes; empty if that is nothing."""
    coming = [
        f"{path} ({domain.hub.repo}; {domain.hub.license})"
        for path, domain in absent_domains(config).values()
        if domain.hub is not None
    ]
    if lacks_tokenizer(config):
        coming.append(f"tokenizer ({config.tokenizer.hub_id}; {config.tokenizer.hub_license or 'licence not stated'})")
    if not (config.data_dir / MANIFEST_NAME).is_file():
        needed = text_bytes_needed(config)
        for name, source in config.data.sources.items():
            if source.is_fetched and source.hub is not None:
                expected = size(needed[name] / text_per_byte(source.hub.files))
                coming.append(f"text of '{name}' ({source.hub.repo}, about {expected}; {source.hub.license})")
    return (
        [f"stage=fetch, with which stage=all begins, gets what is not here yet: {', '.join(coming)}"] if coming else []
    )
