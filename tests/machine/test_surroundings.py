"""Containers with odd users, homes that are read-only or absent, and variables left by other launchers."""

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.machine.surroundings import CACHES, make_bearable, without_place


def test_places_of_other_launchers_are_left_behind_and_nothing_else() -> None:
    """The names are those of torchrun's and Kubeflow's documentation."""
    theirs = """
        RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME NODE_RANK
        MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT PET_NNODES PET_NPROC_PER_NODE PET_MASTER_ADDR
    """.split()  # noqa: SIM905 - so many words in quotes are no easier to read
    ours = ["PATH", "HOME", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS", "MASTER", "WORLD", "PETS"]
    assert without_place(dict.fromkeys(theirs + ours, "1")) == dict.fromkeys(ours, "1")


def test_threads_sleep_unless_told_otherwise(tmp_path: Path) -> None:
    variables = {"HOME": str(tmp_path)}
    assert make_bearable(variables) == [] and variables["OMP_WAIT_POLICY"] == "PASSIVE"
    variables = {"HOME": str(tmp_path), "OMP_WAIT_POLICY": "ACTIVE"}
    make_bearable(variables)
    assert variables == {"HOME": str(tmp_path), "OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize("home", ["/nonexistent/home", "/proc", ""])
def test_caches_move_out_of_a_home_that_cannot_be_written(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("yxanul_nemo.machine.surroundings._home_by_account", lambda: None)
    variables = {"HOME": home, "TRITON_CACHE_DIR": "/mine"}
    (note,) = make_bearable(variables)
    moved = CACHES.keys() - {"TRITON_CACHE_DIR"}
    assert all(name in note and variables[name].startswith(str(tmp_path)) for name in moved)
    assert variables["TRITON_CACHE_DIR"] == "/mine"
    assert variables["HOME"] == home if home == "/proc" else Path(variables["HOME"]).is_dir()


def test_libraries_take_the_caches_from_there(tmp_path: Path) -> None:
    """torch and huggingface_hub themselves are asked, as a user whom the system does not know."""
    program = """
import os, pwd, tempfile

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
tempfile.tempdir = os.environ["TMP_HERE"]
from yxanul_nemo.machine.surroundings import make_bearable
make_bearable(os.environ)
import getpass
from huggingface_hub import constants
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils.cpp_extension import _get_build_directory
print(getpass.getuser(), constants.HF_HUB_CACHE, cache_dir(), _get_build_directory("x", False), os.path.expanduser("~"), sep="\\n")
"""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment |= {"HOME": "/nonexistent", "TMP_HERE": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    user, *folders = done.stdout.split()
    assert user
    assert all(folder.startswith(str(tmp_path)) for folder in folders), folders


def test_a_folder_that_somebody_else_could_fill_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"yxanul-caches-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    variables = {"HOME": "/nonexistent"}
    make_bearable(variables)
    assert (
        "elsewhere" not in str(Path(variables["HOME"]).resolve())
        and Path(variables["HOME"]).stat().st_mode & 0o077 == 0
    )


@pytest.mark.parametrize("is_compiled", [False, True])
def test_bytecode_is_kept_in_a_cache_where_there_is_none(is_compiled: bool, tmp_path: Path) -> None:
    """A package in torch's place, and a process that is told to keep no bytecode, as its child is."""
    sources, home = tmp_path / "sources", tmp_path / "home"
    (sources / "torch").mkdir(parents=True)
    home.mkdir()
    (sources / "torch" / "__init__.py").write_text("")
    if is_compiled:
        compiled = f"__pycache__/__init__.{sys.implementation.cache_tag}.pyc"
        py_compile.compile(str(sources / "torch" / "__init__.py"), str(sources / "torch" / compiled))
    before = sorted(sources.rglob("*"))
    program = (
        "import os, subprocess, sys; from yxanul_nemo.machine.surroundings import keep_bytecode; keep_bytecode(os.environ);"
        "import calendar; subprocess.run([sys.executable, '-c', 'import torch'], check=True)"
    )
    variables = {"HOME": str(home), "PYTHONPATH": f"{REPO_DIR}:{sources}", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", program], env=variables, check=True)
    kept = {path.name.partition(".")[0] for path in home.rglob("*.pyc")}
    assert kept >= {"calendar", "__init__"} if not is_compiled else kept == set()
    assert sorted(sources.rglob("*")) == before
