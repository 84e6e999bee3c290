"""Shared fixtures: configurations, and one small prepared corpus per test session."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import TRIED
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpus import visible_gpus
from yxanul_nemo.machine.surroundings import keep_bytecode

SMALL = (
    "data.demo_bytes=300000",
    "tokenizer.vocab_size=700",
    "tokenizer.transition=600",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.head_dim=8",
    "model.embedding_rank=16",
    "model.max_position_embeddings=128",
    "validation.eval_len=64",
    "curriculum.phases.0.tokens=4096",
    "curriculum.phases.0.tokens_per_step=512",
    "curriculum.phases.1.tokens=6144",
    "curriculum.phases.1.tokens_per_step=1024",
    "curriculum.phases.2.tokens=8192",
    "curriculum.phases.2.tokens_per_step=1024",
    "curriculum.phases.2.seq_len=128",
    "checkpoint.every_tokens=2048",
    "logging.every_steps=2",
    "logging.tensorboard=false",
    "parallel.cpu_threads=1",
)
"""Overrides that make the demo recipe a matter of seconds."""


def pytest_configure() -> None:
    """Processes of the tests share what they have compiled."""
    keep_bytecode(os.environ)
    # pytest-xdist tells its processes how wide the terminal is; tables in tests are as wide as in files.
    os.environ.pop("COLUMNS", None)


def is_whole(config: pytest.Config) -> bool:
    """Return whether no file or test is named."""
    return config.args_source is not pytest.Config.ArgsSource.ARGS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none; those marked `slow` are left to `-m slow` where nothing is chosen."""
    if is_whole(config) and not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if visible_gpus() == 0:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes share the tests: one for each core, up to four, where all are run; none beside this one otherwise.

    Each process imports torch and Megatron and makes the session's fixtures, which pays for many tests only. On GPUs, tests measure memory.
    """
    return min(len(os.sched_getaffinity(0)), 4) if is_whole(config) and visible_gpus() == 0 else 0


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In one of several processes: hand over what was tried in it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = {kind: dict(outcomes) for kind, outcomes in TRIED.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what one of several processes has tried to the rest; one that has crashed hands over nothing."""
    for kind, outcomes in getattr(node, "workeroutput", {}).get("tried", {}).items():
        TRIED.setdefault(kind, Counter()).update(outcomes)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many files that somebody else might have made were tried, and what came of them."""
    if TRIED:
        terminalreporter.section("hostile inputs")
        for kind, outcomes in sorted(TRIED.items()):
            told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            terminalreporter.write_line(f"{kind}: {outcomes.total()} tried, {told}")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the project says from INFO on; its logger does not propagate once it was configured, which an earlier test may have done."""
    # Another test's library may have disabled loggers, all or those that it found.
    was_disabled, logger.disabled = logger.disabled, False
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)
    logger.disabled = was_disabled


@pytest.fixture(scope="session")
def make_config() -> Callable[..., RunConfig]:
    """Compose the small demo with further overrides."""
    return lambda *overrides: parse(compose([*SMALL, *overrides]))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., RunConfig]) -> Path:
    """A run folder with `data/` and `tokenizer/`, made by the data stage itself."""
    from data_prep.prepare import run_data_stage

    folder = tmp_path_factory.mktemp("prepared")
    run_data_stage(make_config(f"run.dir={folder}"))
    return folder
