"""The built package does from any folder what a clone does: its command, its files of `conf/`, and those of the user's own."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL
from yxanul_nemo.config.conf_files import CONF_DIR, REPO_DIR, own_conf_dirs

BUILD = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
COMMAND = (
    "import sys; from importlib.metadata import entry_points\n"
    "sys.argv[0] = 'yxanul'\n"
    "(found,) = entry_points(group='console_scripts', name='yxanul')\n"
    "found.load()()"
)
"""What an installed `yxanul` does."""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, as pip would unpack it."""
    built, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(built)],
        cwd=REPO_DIR,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(built / done.stdout.split()[-1]).extractall(target)
    return target


@pytest.fixture
def yxanul(installed: Path, tmp_path: Path) -> Run:
    """Function (arguments): runs the command in an empty folder that is no clone."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "150"}
        command = [sys.executable, "-P", "-c", COMMAND, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    return run


def test_a_clone_has_its_own_conf_and_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPO_DIR)
    assert own_conf_dirs() == []
    monkeypatch.chdir(tmp_path)
    assert own_conf_dirs() == []
    (tmp_path / "conf").mkdir()
    assert own_conf_dirs() == [tmp_path / "conf"]


@pytest.mark.slow
def test_the_package_holds_every_file_of_conf(installed: Path) -> None:
    inside = installed / "yxanul_nemo" / "conf"
    files = sorted(path.relative_to(CONF_DIR) for path in CONF_DIR.glob("**/*.yaml"))
    recipes = sorted(Path("recipe", path.name) for path in (REPO_DIR / "recipes").glob("*.yaml"))
    assert sorted({*files, *recipes}) == sorted(path.relative_to(inside) for path in inside.glob("**/*.yaml"))
    assert (installed / "data_prep" / "prepare.py").is_file() and not (installed / "tests").exists()


@pytest.mark.slow
def test_the_command_trains_and_exports_from_any_folder(yxanul: Run, tmp_path: Path) -> None:
    done = yxanul("stage=all", *SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "demo" / "export" / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_recipes_and_curricula_of_ones_own_are_found_in_conf(yxanul: Run, tmp_path: Path) -> None:
    for group, name, text in (
        (
            "recipe",
            "my_run",
            "# @package _global_\ndefaults:\n  - override /curriculum: my_phases\nrun:\n  name: my_run\n",
        ),
        (
            "curriculum",
            "my_phases",
            "name: my_phases\nphases:\n  - {seq_len: 32, tokens: 64000, tokens_per_step: 640}\n",
        ),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(text)
    done = yxanul("recipe=my_run", "stage=plan")
    assert done.returncode == 0, done.stderr
    assert "my_run: yxanul_demo" in done.stdout and "total: 64,000 tokens in 100 steps" in done.stdout
    wrong = yxanul("recipe=my_rum", "stage=plan")
    assert wrong.returncode == 2 and "Did you mean 'my_run'?" in wrong.stderr
