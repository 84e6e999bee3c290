"""A folder replaced under kill -9 at every step."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from yxanul_nemo.export.publish import list_files, recover_folder, replace_folder, sync_folder

REPO_DIR = Path(__file__).resolve().parents[2]
REPLACE = """
import os, signal, sys
from pathlib import Path
from yxanul_nemo.export.publish import replace_folder
new, place, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
seen = 0
def count(event, arguments):
    # Every change of a folder is announced before it happens.
    global seen
    if event in ("os.rename", "os.remove", "os.rmdir"):
        seen += 1
        if seen > last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
replace_folder(new, place)
"""


def fill(folder: Path, text: str) -> Path:
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text(text)
    (folder / "model.nemo").write_text(text)
    return folder


def read(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("had_old", [True, False])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path: Path, had_old: bool) -> None:
    states = []
    for steps in range(20):
        box = tmp_path / str(steps)
        new, place = fill(box / ".export.tmp", "new"), box / "export"
        if had_old:
            fill(place, "old")
        arguments = [sys.executable, "-c", REPLACE, str(new), str(place), str(steps)]
        code = subprocess.run(arguments, cwd=REPO_DIR, check=False).returncode
        recover_folder(place)
        state = read(place) if place.exists() else set()
        states.append(state)
        assert not (box / "export.old").exists()
        assert state in ([{"old"}, {"new"}] if had_old else [set(), {"new"}])
        # The next export, whatever was left.
        shutil.rmtree(new, ignore_errors=True)
        replace_folder(fill(new, "newer"), place)
        assert read(place) == {"newer"}
        assert sorted(path.name for path in box.iterdir()) == ["export"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0, "the replacement ends"
    assert states[0] == ({"old"} if had_old else set())
    assert states[-1] == {"new"}
    assert len(states) == (7 if had_old else 2), "two renames and three files and folders to remove, or one rename"


@pytest.mark.parametrize("present", [("export.old",), ("export", "export.old"), ("export",), ()])
def test_a_folder_is_replaced_whatever_a_kill_left(tmp_path: Path, present: tuple[str, ...]) -> None:
    for name in present:
        fill(tmp_path / name, "old")
    replace_folder(fill(tmp_path / "new", "new"), tmp_path / "export")
    assert read(tmp_path / "export") == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_files_are_listed_with_size_and_sha256(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x", "abc")
    sync_folder(folder)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert list_files(folder) == {name: {"bytes": 3, "sha256": digest} for name in ("hf/config.json", "model.nemo")}


def test_nothing_is_recovered_where_nothing_was_replaced(tmp_path: Path) -> None:
    recover_folder(tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
