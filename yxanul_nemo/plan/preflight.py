"""What a run needs and what of it is here, in one table at the beginning of `stage=plan` and `stage=check`. No torch."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from data_prep.corpus.indexed import token_dtype
from data_prep.corpus.manifest import MANIFEST_NAME, load_manifest
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, tokens_per_source
from yxanul_nemo.errors import UserError
from yxanul_nemo.fetch.needs import absent_domains, lacks_tokenizer, text_bytes_needed, text_per_byte
from yxanul_nemo.fetch.record import FetchedSource
from yxanul_nemo.figures import count, duration, size
from yxanul_nemo.hub import cache_dir
from yxanul_nemo.machine.gpus import found_gpus, nvidia_driver
from yxanul_nemo.plan.gpu import choose_gpu, planned_precision
from yxanul_nemo.plan.needs import check_formats, check_tokenizer, check_trackers
from yxanul_nemo.plan.source_sizes import bytes_per_token, source_size
from yxanul_nemo.validation.files import check_domain_file

State = Literal["here", "to come", "missing"]
TOKENIZED_BYTES_PER_SECOND_PER_CORE = 7.7e6
"""Text tokenized by one core: 15.4 MB/s on two cores of an Intel Xeon with a 200k SuperBPE tokenizer, 2026-11-25 (BENCHMARKS.md)."""
LEAST_DRIVER = 580
"""NVIDIA driver that CUDA 13, for which torch is built, needs."""
FETCH = "stage=fetch, with which stage=all begins, gets it."
STYLES = {"here": "green", "to come": "cyan", "missing": "bold red"}


@dataclass(frozen=True)
class Need:
    """One thing that a run needs; the names are the keys of `plan.json`."""

    what: str
    state: State
    """`to come`: a stage makes or fetches it."""
    found: str
    """What is here, or what is wrong."""
    command: str = ""
    """What gets it, or mends it."""


def needs_of(config: RunConfig) -> list[Need]:
    """Return what the run needs, each thing looked at; nothing is read whole, fetched or written."""
    return [*_data(config), _tokenizer(config), *_validation(config), *_packages(config)]


def needs_table(needs: list[Need]) -> Table:
    """Return the needs as a table, a row each."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("needs")
    table.add_column("")
    table.add_column("what is here", overflow="fold")
    for need in needs:
        words = f"{need.found}. {need.command}" if need.command else need.found
        table.add_row(escape(need.what), f"[{STYLES[need.state]}]{need.state}[/]", escape(words))
    return table


def tokens_bytes_to_come(config: RunConfig, vocab_size: int) -> float:
    """Return what the tokens that `stage=data` will write take of disk; 0 where they are there or cannot be known."""
    if (config.data_dir / MANIFEST_NAME).is_file():
        return 0.0
    text_bytes = sum(_text_bytes(config, name) for name in config.data.source_names)
    return text_bytes / bytes_per_token(config.tokenizer)[0] * token_dtype(vocab_size).itemsize


def _data(config: RunConfig) -> Iterator[Need]:
    if (config.data_dir / MANIFEST_NAME).is_file():
        try:
            manifest = load_manifest(config.data_dir)
        except UserError as error:
            yield _missing("data", error)
            return
        for name in config.data.source_names:
            if name in manifest.sources:
                tokens = manifest.sources[name].tokens("train")
                yield Need(
                    f"data {name}",
                    "here",
                    f"{count(tokens)} tokens are prepared in {config.data_dir}{_epochs(config, name, tokens)}",
                )
        return
    if config.data.demo_corpus:
        made = f"{size(config.data.demo_bytes)} of documentation of the installed packages"
        yield Need("data", "to come", f"{made}, made by stage=data{_tokenizing(config, config.data.demo_bytes)}")
        return
    for name, source in config.data.sources.items():
        yield _source(config, name, source)


def _source(config: RunConfig, name: str, source: SourceConfig) -> Need:
    what = f"data {name}"
    if source.is_fetched:
        assert source.hub is not None
        needed = text_bytes_needed(config)[name]
        record = FetchedSource.load(config.fetched_dir / name)
        if record is not None and (record.is_all or record.text_bytes >= needed):
            fetched = f"{len(record.files)} files of {source.hub.repo} are fetched, {size(record.text_bytes)} of text"
            return Need(what, "here", f"{fetched}{_tokenizing(config, record.text_bytes)}")
        expected = size(needed / text_per_byte(source.hub.files))
        fetched = f"about {expected} of {source.hub.repo} ({source.hub.license}){_tokenizing(config, needed)}"
        return Need(what, "to come", fetched, FETCH)
    try:
        found = source_size(name, source)
    except UserError as error:
        return _missing(what, error)
    files = (
        f"{found.files:,} files" if found.files != found.shards else f"{found.shards:,} shard{'s'[: found.shards > 1]}"
    )
    tokens = found.text_bytes / bytes_per_token(config.tokenizer)[0]
    if source.ids_column is not None:
        return Need(what, "here", f"{files}, {size(found.file_bytes)} with token ids")
    words = f"{files}, {size(found.file_bytes)} with about {size(found.text_bytes)} of text"
    return Need(
        what, "here", f"{words}{_epochs(config, name, tokens, about='about ')}{_tokenizing(config, found.text_bytes)}"
    )


def _text_bytes(config: RunConfig, name: str) -> float:
    """Text of a source, as far as it can be known without reading it."""
    if config.data.demo_corpus:
        return config.data.demo_bytes / len(config.data.source_names)
    source = config.data.sources[name]
    if source.is_fetched:
        return text_bytes_needed(config)[name]
    try:
        return source_size(name, source).text_bytes
    except UserError:
        # Named among the needs.
        return 0.0


def _epochs(config: RunConfig, name: str, tokens: float, about: str = "") -> str:
    """How much of a source's tokens the curriculum reads, in words; shares that depend on sizes are taken for equal."""
    equal = dict.fromkeys(config.data.source_names, 1)
    read = tokens_per_source(plan_phases(config.curriculum), equal)[name] / max(
        1.0, tokens * (1 - config.data.heldout_fraction)
    )
    told = f", {about}{count(tokens)} tokens" if about else ""
    limit = f", more often than data.max_epochs={config.data.max_epochs:g}" if read > config.data.max_epochs else ""
    return f"{told}, read {about}{read:.2g} times{limit}"


def _tokenizing(config: RunConfig, text_bytes: float) -> str:
    cores = config.data.workers or len(os.sched_getaffinity(0))
    return f"; tokenizing takes about {duration(text_bytes / TOKENIZED_BYTES_PER_SECOND_PER_CORE / cores)} on {cores} cores"


def _tokenizer(config: RunConfig) -> Need:
    tokenizer, folder = config.tokenizer, config.run.folder.tokenizer
    what = f"tokenizer {tokenizer.name}"
    if folder.is_dir() and any(folder.iterdir()):
        return Need(what, "here", f"built in {folder}")
    if (config.data_dir / MANIFEST_NAME).is_file():
        try:
            check_tokenizer(config)
        except UserError as error:
            return _missing(what, error)
    if tokenizer.kind.startswith("train_"):
        return Need(what, "to come", f"{tokenizer.vocab_size:,} ids, trained on the run's text by stage=data")
    if tokenizer.path is not None:
        if not tokenizer.path.exists():
            return Need(
                what, "missing", f"{tokenizer.path} does not exist", "Set tokenizer.path to a folder or file with it."
            )
        return Need(what, "here", f"in {tokenizer.path}")
    assert lacks_tokenizer(config)
    cached = cache_dir() / f"models--{str(tokenizer.hub_id).replace('/', '--')}"
    if cached.is_dir():
        return Need(what, "here", f"{tokenizer.hub_id} in the hub's cache, {cached}")
    licence = tokenizer.hub_license or "licence not stated"
    return Need(what, "to come", f"{tokenizer.hub_id} ({licence})", FETCH)


def _validation(config: RunConfig) -> Iterator[Need]:
    coming = absent_domains(config)
    for name, domain in config.validation.domains.items():
        what = f"validation {name}"
        if domain.source is not None:
            share = f"{100 * config.data.heldout_fraction:.3g}% of the documents of '{domain.source}'"
            yield Need(what, "here", f"{share}, which are held out")
        elif name in coming and domain.hub is not None:
            path, _ = coming[name]
            yield Need(
                what,
                "to come",
                f"{path}, from {domain.hub.repo} ({domain.hub.license})",
                FETCH,
            )
        else:
            try:
                check_domain_file(config.validation, name, domain)
            except UserError as error:
                yield _missing(what, error)
            else:
                yield Need(what, "here", f"{config.validation.dir / str(domain.path)} has what the template names")


def _packages(config: RunConfig) -> Iterator[Need]:
    for check, section in (
        (lambda: check_trackers(config.logging), "logging"),
        (lambda: check_formats(config.export), "export"),
    ):
        if (error := _error_of(check)) is not None:
            yield _missing(f"packages for {section}", error)
    found = found_gpus()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core", "nemo_toolkit")]
    yield Need("packages", "here", ", ".join(versions))
    try:
        gpu, _ = choose_gpu(config, found)
    except UserError as error:
        yield _missing("GPU", error)
        return
    if gpu is None:
        return
    if not found:
        yield Need(
            "GPU",
            "here",
            f"{gpu.name} is planned for; this machine has none, so driver and Transformer Engine were not looked at",
        )
        return
    driver = nvidia_driver()
    major = re.match(r"\d+", driver or "")
    if driver is None or major is None or int(major[0]) < LEAST_DRIVER:
        package = f"nvidia-driver-{LEAST_DRIVER}-open"
        fix = f"Install NVIDIA's driver {LEAST_DRIVER} or newer; on Ubuntu: `sudo apt install {package}`, then restart."
        yield Need("driver", "missing", f"{driver or 'none'} is here, and CUDA 13 needs {LEAST_DRIVER}", fix)
    else:
        yield Need("driver", "here", driver)
    if config.parallel.layer_spec != "torch" and planned_precision(config, gpu).is_fp8:
        has_te = importlib.util.find_spec("transformer_engine") is not None
        words = "installed" if has_te else "not installed, and FP8 needs it"
        fix = "" if has_te else "`uv sync --inexact --extra te`, or precision=bf16 parallel.layer_spec=torch."
        yield Need("Transformer Engine", "here" if has_te else "missing", words, fix)


def _error_of(check: Callable[[], None]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


def _missing(what: str, error: UserError) -> Need:
    expected = f"; expected {error.expected}" if error.expected else ""
    return Need(what, "missing", f"{error.where}: {error.problem}{expected}", error.fix)
