"""Small runs that tests of training share."""

import shutil
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training import sessions
from tests.training.runs import PHASES, MakeRun
from yxanul_nemo.config.run import RunConfig


@pytest.fixture(scope="session")
def make_run(prepared: Path, make_config: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A new run's folder with data and tokenizer in it. Records do not fall on the same steps as checkpoints."""

    def make(*overrides: str) -> RunConfig:
        folder = tmp_path_factory.mktemp("run")
        for part in ("data", "tokenizer"):
            shutil.copytree(prepared / part, folder / part)
        return make_config(f"run.dir={folder}", "logging.every_steps=3", *overrides)

    return make


@pytest.fixture(scope="session")
def counted(make_run: MakeRun) -> tuple[RunConfig, dict[str, dict[int, int]]]:
    """A run that was never disturbed, and the lines that its pieces of work took."""
    config = make_run()
    return config, run_ranks(sessions.train_and_count, 1, config, PHASES)[0]


@pytest.fixture(scope="session")
def straight(counted: tuple[RunConfig, dict]) -> RunConfig:
    """A run that was never disturbed."""
    return counted[0]
