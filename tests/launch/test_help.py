"""The help page names everything that there is."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL
from yxanul_nemo.config.conf_files import CONF_DIR, REPO_DIR
from yxanul_nemo.launch.help import LOOKING, PIPELINE, help_text
from yxanul_nemo.launch.lone_stages import LONE_STAGES
from yxanul_nemo.launch.stages import STAGES


def test_every_stage_has_its_line() -> None:
    assert tuple(PIPELINE) == STAGES
    assert set(LOOKING) == set(LONE_STAGES)


def test_every_recipe_and_option_is_named() -> None:
    text = help_text()
    for path in CONF_DIR.glob("*/*.yaml"):
        if path.stem != "default" and len(list(path.parent.glob("*.yaml"))) > 1:
            assert path.stem in text, path
    assert max(map(len, text.splitlines())) <= 132, "wide enough for a terminal"


FRAMEWORKS = {"torch", "megatron", "nemo", "lightning", "transformers", "tokenizers", "sentencepiece", "matplotlib"}


@pytest.mark.parametrize(
    ("argument", "heavy"),
    [
        ("--help", FRAMEWORKS | {"hydra", "omegaconf", "pydantic", "numpy", "pyarrow"}),
        ("stage=help", FRAMEWORKS),
        ("stage=plan", FRAMEWORKS),
        ("stage=status", FRAMEWORKS),
    ],
)
def test_what_only_looks_imports_nothing_heavy(prepared: Path, argument: str, heavy: set[str]) -> None:
    command = [sys.executable, "-X", "importtime", "launcher.py", *SMALL, f"run.dir={prepared}", argument]
    done = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "yxanul_nemo.errors" in imported
    assert not {name for name in imported if name.partition(".")[0] in heavy}
