"""A run with an export, and a hub of our own to publish it on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.export.conftest import exported, make_run  # noqa: F401 - fixtures
from tests.fetch.conftest import hub  # noqa: F401 - a fixture
from tests.fetch.hub_server import HubServer
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig

NAME, TOKEN = "me/small", "hf_of_the_writer"


@pytest.fixture
def run(exported: tuple[RunConfig, Checkpoint], tmp_path: Path) -> RunConfig:  # noqa: F811
    """A copy of the exported run, as the launcher leaves it, that a test may change; `publish.repo` is `NAME`."""
    config = exported[0]
    folder = tmp_path / "run"
    shutil.copytree(config.run.dir, folder, symlinks=True)
    changed = {
        "stage": "publish",
        "run": config.run.model_copy(update={"dir": folder}),
        "publish": config.publish.model_copy(update={"repo": NAME}),
    }
    config = config.model_copy(update=changed)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return config


@pytest.fixture
def writable(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:  # noqa: F811
    """The hub, and a token to write to it. Large files go by LFS: Xet's store speaks a protocol of its own."""
    hub.writer = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
