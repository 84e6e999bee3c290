"""Rooms of the code import downwards only, and no files import each other in a circle. Late imports inside functions count as well."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from yxanul_nemo.config.conf_files import REPO_DIR

ROOMS = (
    "benchmarks/",
    "launcher.py",
    "yxanul_nemo/launch/",
    "yxanul_nemo/bench/",
    "yxanul_nemo/publish/",
    "yxanul_nemo/report/",
    "yxanul_nemo/evaluation/",
    "yxanul_nemo/export/",
    "yxanul_nemo/training/",
    "yxanul_nemo/plan/",
    "yxanul_nemo/fetch/",
    "yxanul_nemo/validation/",
    "yxanul_nemo/checkpoint/",
    "yxanul_nemo/model/",
    "yxanul_nemo/kernels/",
    "yxanul_nemo/curriculum/",
    "yxanul_nemo/data/",
    "data_prep/",
    "data_prep/corpus/",
    "data_prep/tokenizers/",
    "yxanul_nemo/machine/",
    "yxanul_nemo/config/",
    "yxanul_nemo/unpacking/",
    "yxanul_nemo/",
)
"""From top to bottom."""


def imports(repo: Path) -> dict[Path, set[Path]]:
    """Files of `repo`'s rooms, relative to it -> the files that each imports, at its top or later."""
    folders = {room.split("/")[0] for room in ROOMS if room.endswith("/")}
    files = [repo / "launcher.py", *(path for folder in folders for path in (repo / folder).rglob("*.py"))]
    return {path.relative_to(repo): set(_imported(path, repo)) for path in files if path.exists()}


def _imported(path: Path, repo: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # Each name may be a module of its own or something inside of one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            module = Path(*name.split("."))
            candidates = [Path(f"{path}{end}") for path in (module, module.parent) for end in (".py", "/__init__.py")]
            yield from [found for found in candidates if (repo / found).exists()][:1]


def room_of(file: Path) -> str:
    """The innermost room that a file is in."""
    return max((room for room in ROOMS if file.as_posix().startswith(room)), key=len)


def climbs(graph: dict[Path, set[Path]]) -> list[str]:
    """Imports from a room that is above the importing file's room."""
    return sorted(
        f"{file} imports {imported}"
        for file, targets in graph.items()
        for imported in targets
        if ROOMS.index(room_of(imported)) < ROOMS.index(room_of(file))
    )


def circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """Files that import each other in a circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_rooms_import_downwards() -> None:
    assert climbs(imports(REPO_DIR)) == []


def test_no_circle_of_files() -> None:
    assert circle(imports(REPO_DIR)) == []


def test_each_room_has_files() -> None:
    assert {room_of(file) for file in imports(REPO_DIR)} == set(ROOMS)


def test_contributing_shows_the_same_order() -> None:
    page = (REPO_DIR / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) == ROOMS


@pytest.mark.parametrize(
    "statement",
    [
        "from yxanul_nemo.training.loop import train_phase",
        "import yxanul_nemo.training.loop",
        "from yxanul_nemo.training import loop",
        "def late():\n    from yxanul_nemo.training.loop import train_phase",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from yxanul_nemo.training.loop import train_phase",
    ],
)
def test_an_import_upwards_is_found(tmp_path: Path, statement: str) -> None:
    loop = tmp_path / "yxanul_nemo" / "training" / "loop.py"
    store = tmp_path / "yxanul_nemo" / "checkpoint" / "store.py"
    for path, text in ((loop, "from yxanul_nemo.checkpoint.store import CheckpointStore"), (store, statement)):
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    graph = imports(tmp_path)
    assert climbs(graph) == ["yxanul_nemo/checkpoint/store.py imports yxanul_nemo/training/loop.py"]
    assert {path.name for path in circle(graph)} == {"loop.py", "store.py"}
