"""Commands, links and code in README.md, CONTRIBUTING.md and docs/ are right.

What trains, needs a GPU, a cluster or a download is composed and checked as the launcher would before it begins; the tour's own
commands run in tests/launch/test_end_to_end.py.
"""

import ast
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from yxanul_nemo.config.command_line import config_dirs_in, for_hydra, overrides_in
from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.curriculum.phases import selected_phases
from yxanul_nemo.launch.lone_stages import LONE_STAGES
from yxanul_nemo.launch.stages import selected_stages
from yxanul_nemo.launch.sweep import plan_sweep

PAGES = [REPO_DIR / "README.md", REPO_DIR / "CONTRIBUTING.md", *sorted((REPO_DIR / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:uv|pip|python) [^`]+)`")
PICTURE_BYTES = 200_000
FRONT_PAGE_LINES = 180
"""README.md is read in one go; what is longer belongs into docs/guide/."""


def commands(page: Path) -> list[str]:
    """Each command of a page's bash blocks, and inline ones."""
    text = page.read_text(encoding="utf-8")
    found = INLINE.findall(BLOCK.sub("", text))
    for language, block in BLOCK.findall(text):
        if language == "bash":
            found += block.replace("\\\n", " ").splitlines()
    pieces = (piece for line in found for piece in re.sub(r"\s#.*", "", line).split("&&"))
    return [piece.strip() for piece in pieces if piece.strip()]


ALL = [(page, command) for page in PAGES for command in commands(page)]


def check_launcher(arguments: list[str]) -> None:
    """The command line composes, its values are valid, and its stages and phases exist."""
    if "-m" in arguments:
        assert len(plan_sweep(overrides_in(for_hydra(arguments)), []).arms) > 1
        return
    config = parse(compose(overrides_in(for_hydra(arguments)), config_dirs_in(arguments)))
    if config.stage not in LONE_STAGES:
        selected_stages(config.stage)
    selected_phases(config.phases, len(config.curriculum.phases))


def check_module(module: str, arguments: list[str]) -> None:
    """The module exists and has the options that are given."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert [argument for argument in arguments if argument.startswith("-") and argument not in strings] == []


def check(command: str) -> None:
    """Fail for a command that cannot work."""
    words = shlex.split(command)
    project = tomllib.loads((REPO_DIR / "pyproject.toml").read_text(encoding="utf-8"))
    match words:
        case (
            ["pip", "install", "uv" | "."]
            | ["uv", "lock"]
            | ["cd", "yxanul"]
            | ["git", "clone", "REPOSITORY", "yxanul"]
        ):
            pass
        case ["sudo", "apt" | "reboot", *_] | ["curl", "-LsSf", "https://astral.sh/uv/install.sh", "|", "sh"]:
            pass
        case ["uvx", "--python", "3.12", "--from", _, "yxanul", *arguments]:
            assert "yxanul" in project["project"]["scripts"]
            check_launcher(arguments)
        case ["nohup", "uv", "run", "python", "launcher.py", *arguments, ">", "train.log", "2>&1", "&"]:
            check_launcher(arguments)
        case ["apptainer", "build", "yxanul.sif", definition]:
            assert (REPO_DIR / definition).read_text(encoding="utf-8").startswith("Bootstrap: docker\n")
        case ["apptainer", "run", "--nv", "yxanul.sif", *arguments]:
            check_launcher(arguments)
        case ["uv", "sync", *options]:
            options = [option for option in options if option != "--inexact"]
            assert len(options) % 2 == 0 and set(options[::2]) <= {"--extra"}
            assert set(options[1::2]) <= set(project["project"]["optional-dependencies"])
        case ["uv", "run", "python", "launcher.py", *arguments] | ["python", "launcher.py", *arguments]:
            if "recipe=NAME" not in arguments:
                check_launcher(arguments)
        case ["uv", "run", "--with", _, "python", "launcher.py", *arguments]:
            check_launcher(arguments)
        case ["uv", "run", "python", "-m", module, *arguments] | ["python", "-m", module, *arguments]:
            check_module(module, arguments)
        case ["uv", "run", "--script", script, *_]:
            assert (REPO_DIR / script).read_text(encoding="utf-8").startswith("# /// script\n")
        case ["uv", "run", "pytest", *arguments]:
            assert not arguments or arguments == ["-m", "gpu"]
        case ["docker", "build", "-f", dockerfile, *_]:
            assert (REPO_DIR / dockerfile).is_file()
        case ["docker", "run", *_] if "launcher.py" in words:
            check_launcher(words[words.index("launcher.py") + 1 :])
        case ["enroot", "import", "-o", image, source]:
            assert image.endswith(".sqsh") and source.startswith("dockerd://")
        case ["uv", "run", program, *_]:
            assert importlib.metadata.entry_points(group="console_scripts", name=program) or program == "ruff"
        case _:
            pytest.fail(f"unknown kind of command: {command}")


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in ALL if not command.startswith("eval")))
def test_every_command_is_right(command: str) -> None:
    check(command)


def test_there_are_commands_of_every_kind() -> None:
    text = "\n".join(command for _, command in ALL)
    for part in (
        "stage=all",
        "stage=plan",
        "stage=report",
        "runs=[",
        "uv sync",
        "-m data_prep",
        "recipe=yxanul_197m_h100",
    ):
        assert part in text


@pytest.mark.parametrize(
    "command", ["python launcher.py recipe=yxanul_197m_h10", "uv sync --extra nothing", "make all"]
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check(command)


def test_completion_is_what_the_page_says() -> None:
    (install,) = [command for _, command in ALL if command.startswith("eval")]
    typed = "python launcher.py recipe=yxanul_197m_h"
    ask = "COMP_LINE=$1; COMP_POINT=${#1}; COMP_WORDS=($1); COMP_CWORD=2; hydra_bash_completion; echo ${COMPREPLY[@]}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{install}\n{ask}", "bash", typed],
        cwd=REPO_DIR, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["recipe=yxanul_197m_h100", "recipe=yxanul_197m_h200"]


def anchors(page: Path) -> set[str]:
    """Return what links may name in `page`: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_code_is_python(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if not target.startswith("http"):
            linked = page.parent / target if target else page
            assert linked.is_file(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    for language, block in BLOCK.findall(text):
        if language == "python":
            ast.parse(block)


def test_pictures_are_small() -> None:
    pictures = list((REPO_DIR / "docs").glob("*.png"))
    assert pictures and all(path.stat().st_size < PICTURE_BYTES for path in pictures)


@pytest.mark.parametrize("page", ["architecture.md", "guide/changing-the-code.md"])
def test_named_paths_exist(page: str) -> None:
    """Modules and folders that pages about the code name."""
    text = (REPO_DIR / "docs" / page).read_text(encoding="utf-8")
    names = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    assert names
    for name in names:
        places = [REPO_DIR / folder / name for folder in (".", "yxanul_nemo", "data_prep/corpus")]
        assert any(place.exists() for place in places) or name in ("report/", "export/"), name


def test_every_page_of_the_guide_is_linked_and_the_front_page_is_short() -> None:
    text = (REPO_DIR / "README.md").read_text(encoding="utf-8")
    for page in (REPO_DIR / "docs" / "guide").glob("*.md"):
        assert f"](docs/guide/{page.name})" in text, page.name
    assert len(text.splitlines()) < FRONT_PAGE_LINES
