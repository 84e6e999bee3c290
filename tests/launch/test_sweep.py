"""Grids of runs: folders, places, a kill in between, the table and the report; as a job array its script."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.launch.launching import REPO_DIR, Launched, launch
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.command_line import for_hydra
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.arms import Arm, places_here, run_arms
from yxanul_nemo.launch.sweep import Cell, Sweep, plan_sweep

ONE_PHASE = ("~curriculum.phases.2", "~curriculum.phases.1", "validation.every_documents=2")


def plan(*arguments: str) -> Sweep:
    return plan_sweep(for_hydra(["-m", *SMALL, *arguments])[1:], [])


def test_every_combination_has_its_own_folder() -> None:
    sweep = plan("optim.lr=1e-3,2e-3", "run.seed=1,2", "stage=train", "run.dir=somewhere")
    assert [arm.name for arm in sweep.arms] == [
        "optim.lr=0.001,run.seed=1",
        "optim.lr=0.001,run.seed=2",
        "optim.lr=0.002,run.seed=1",
        "optim.lr=0.002,run.seed=2",
    ]
    assert {arm.folder for arm in sweep.arms} == {Path("somewhere") / arm.name for arm in sweep.arms}
    assert all("data.dir=somewhere/data" in arm.arguments and arm.stages == ("train",) for arm in sweep.arms)
    assert plan("optim.lr=1e-3,2e-3").folder == Path("runs/demo_sweep")
    own = plan("optim.lr=1e-3,2e-3", "run.dir=a/${optim.lr}")
    assert [arm.folder for arm in own.arms] == [Path("a/0.001"), Path("a/0.002")]


def test_tokens_are_shared_unless_they_differ() -> None:
    for arguments in (("data.demo_bytes=200000,300000",), ("tokenizer.vocab_size=700,800",)):
        arms = plan(*arguments).arms
        assert not [text for arm in arms for text in arm.arguments if text.startswith("data.dir=")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optim.lr=1e-3",), "-m: varies nothing"),
        (("optim.lr=1e-3,-1",), "optim.lr: got -1"),
        (("optim.lrr=1,2",), "optim.lrr: no such key"),
    ],
)
def test_a_mistake_in_any_arm_is_told_before_the_first_begins(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(*arguments)


def test_a_cell_has_the_mean_and_the_spread_of_its_seeds() -> None:
    assert Cell({}, [1.0, 3.0]).mean == 2 and Cell({}, [1.0, 3.0]).spread == pytest.approx(2**0.5)
    assert Cell({}, [1.0]).spread is None and Cell({}, []).mean == float("inf")


def test_a_cpu_has_several_places_and_the_user_may_say_how_many() -> None:
    cores = len(os.sched_getaffinity(0))
    assert places_here(1, None, on_cpu=True) == [""] * cores
    assert places_here(10 * cores, None, on_cpu=True) == [""] and len(places_here(0, 5, on_cpu=True)) == 5


def test_an_arm_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    told = {}
    arms = [
        Arm("good", tmp_path / "good", (), ("help",)),
        Arm("bad", tmp_path / "bad", ("optim.lrr=1",), ("help",)),
    ]
    codes = run_arms(arms, ["", ""], lambda arm, code: told.setdefault(arm.name, code))
    assert codes == told == {"good": 0, "bad": 2}
    assert "optim.lrr: no such key" in (tmp_path / "bad" / "sweep.log").read_text()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_with_a_table_and_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    asked = (*ONE_PHASE, "optim.lr=5e-3,1e-2", "run.seed=1,2", "stage=[data,train]", f"run.dir={folder}")
    launched = Launched(tmp_path / "killed.txt", "-m", *asked)
    launched.wait_until_printed("done, ")
    launched.process.kill()
    launched.process.wait()
    done = launch("-m", *asked)
    assert done.returncode == 0, done.stdout
    kept = json.loads((folder / "sweep.json").read_text())["cells"]
    assert [len(cell["bits_per_byte"]) for cell in kept] == [2, 2] and kept[0]["mean"] < kept[1]["mean"]
    assert "best" in done.stdout and f"{kept[0]['mean']:.4f}" in done.stdout
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Grid" in page and f"{kept[0]['mean']:.4f}" in page
    arms = sorted(path.parent for path in folder.glob("*/checkpoints"))
    assert len(arms) == 4 and all(CheckpointStore(arm / "checkpoints").list()[-1].phase_end for arm in arms)
    assert len(list(folder.glob("data/manifest.json"))) == 1 and not list(folder.glob("*/data"))


def test_a_job_array_runs_one_arm_in_each_task(tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    done = launch(
        "-m", "optim.lr=5e-3,1e-2", "stage=data", f"run.dir={folder}", "cluster=slurm", "cluster.dry_run=true"
    )
    assert done.returncode == 0 and "2 tasks; nothing was submitted" in done.stdout, done.stdout
    script = folder / "sweep.sh"
    assert "#SBATCH --array=0-1" in script.read_text()
    ran = subprocess.run(
        ["bash", str(script)],
        cwd=REPO_DIR,
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert (folder / "data" / "manifest.json").is_file()
    assert (folder / "optim.lr=0.01" / "tokenizer").is_dir() and not (folder / "optim.lr=0.005" / "tokenizer").exists()
