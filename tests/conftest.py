"""Shared fixtures: configurations, and one small prepared corpus per test session."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import TRIED
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpus import visible_gpus

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if visible_gpus() == 0:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


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
