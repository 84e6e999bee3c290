"""Job scripts and the srun inside them, without a Slurm: what they say, what is refused, and that shell reads them."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.outputs import NotifyConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.slurm.job import RunningJob
from yxanul_nemo.launch.slurm.rank import torchrun_environment
from yxanul_nemo.launch.slurm.record import ChainRecord, Job, JobNote
from yxanul_nemo.launch.slurm.script import render
from yxanul_nemo.launch.slurm.step import srun_command
from yxanul_nemo.launch.slurm.submit import check_cluster
from yxanul_nemo.launch.stages import Stopped, run_stages
from yxanul_nemo.launch.status import status_rows
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.machine.gpus import world_size

LAB = (
    "parallel.device=auto",
    "cluster=slurm",
    "cluster.partition=gpu",
    "cluster.data_partition=cpu",
    "cluster.account=lm",
    "cluster.nodes=2",
    "cluster.gpus_per_node=8",
    "cluster.gpu_type=h100",
    "cluster.cpus_per_task=12",
    "cluster.mem=0",
    "+cluster.times={phase-03: '12:00:00', data: '30'}",
    "cluster.modules=[cuda/13.0]",
    "+cluster.environment={NCCL_SOCKET_IFNAME: ib0, GREETING: 'two words'}",
    "cluster.sbatch=['--exclusive']",
    "cluster.srun=['--mpi=pmix']",
)


def lines(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}


def read_by_shell(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_phase_asks_for_all_nodes_and_the_data_stage_for_one_without_gpus(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config(*LAB, f"run.dir={tmp_path / 'run'}")
    phase, data, export = (render(config, Task.named(name), None) for name in ("phase-03", "data", "export"))
    for script in (phase, data, export):
        read_by_shell(script)
        assert script.startswith("#!/bin/bash -l\n# demo: ")
        assert {"--account=lm", "--mem=0", "--exclusive", "--requeue", "--kill-on-invalid-dep=yes"} <= lines(script)
        assert {"--signal=B:USR1@120", f"--chdir={Path.cwd()}", "--open-mode=append"} <= lines(script)
        for wanted in ("module load cuda/13.0", "export NCCL_SOCKET_IFNAME=ib0", "export GREETING='two words'"):
            assert wanted in script.splitlines()
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=h100:8", "--cpus-per-task=12"} <= lines(phase)
    assert {"--partition=gpu", "--time=12:00:00", "--job-name=demo/phase-03"} <= lines(phase)
    assert f"--output={tmp_path}/run/slurm/phase-03-%j.out" in lines(phase)
    assert {"--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=96", "--partition=cpu", "--time=30"} <= lines(data)
    assert not any("gpus" in line for line in lines(data))
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=h100:1", "--time=04:00:00"} <= lines(export)
    command = f"exec {sys.executable} -m yxanul_nemo.launch.slurm.job {tmp_path}/run phase-03 --after phase-02"
    assert command in render(config, Task.named("phase-03"), Task.named("phase-02")).splitlines()
    watched = config.model_copy(update={"callbacks": ["tests.watching.Watcher"]})
    with_callback = render(watched, Task.named("phase-03"), Task.named("phase-02")).splitlines()
    assert f"{command} --callback=tests.watching.Watcher" in with_callback
    assert not any("--callback" in line for line in render(watched, Task("export"), None).splitlines())
    told = config.model_copy(update={"notify": NotifyConfig(command="echo 'a b'", events=["failure"])})
    (argument,) = shlex.split(render(told, Task("export"), None).splitlines()[-1])[-1:]
    assert NotifyConfig.model_validate_json(argument.removeprefix("--notify=")) == told.notify


def test_what_is_not_chosen_is_not_asked_for(make_config: Callable[..., RunConfig]) -> None:
    script = render(
        make_config("cluster=slurm", "cluster.gpus_per_node=0", "cluster.requeue=false"), Task("train", 1), None
    )
    said = lines(script)
    assert "--no-requeue" in said and "--requeue" not in said
    for option in ("partition", "account", "qos", "constraint", "mem", "gpus", "cpus-per-task"):
        assert not any(line.startswith(f"--{option}") for line in said)
    assert script.startswith("#!/bin/bash\n")


def test_the_demo_asks_for_no_gpus(make_config: Callable[..., RunConfig]) -> None:
    """Its recipe is for a CPU, and a cluster without GPUs refuses a job that names them."""
    config = make_config("cluster=slurm")
    assert config.cluster.gpus_per_node > 0
    for task in (Task("data"), Task("train", 1), Task("validate"), Task("export")):
        assert not any("gpu" in line or "gres" in line for line in lines(render(config, task, None)))


def test_srun_starts_one_rank_for_each_gpu(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(*LAB)
    assert world_size(config) == 16
    command = srun_command(config, ranks_per_node=8, ranks=16)
    assert command[:4] == ["srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"]
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=12", "--mpi=pmix"} <= set(command)
    assert command[-4:-1] == [sys.executable, "-m", "yxanul_nemo.launch.slurm.rank"] and int(command[-1]) > 1023
    assert srun_command(config, ranks_per_node=8, ranks=1)[1:4] == ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]


def test_a_container_sees_the_same_folders_and_has_its_own_interpreter(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    image, run_dir = tmp_path / "image.sqsh", tmp_path / "run"
    image.touch()
    run_dir.mkdir()
    overrides = (f"cluster.container.image={image}", "cluster.container.mounts=['/scratch:/scratch:ro']")
    command = srun_command(make_config(*LAB, *overrides, f"run.dir={run_dir}"), 8, 8)
    assert {f"--container-image={image}", f"--container-workdir={Path.cwd()}"} <= set(command)
    (mounts,) = (part.partition("=")[2].split(",") for part in command if part.startswith("--container-mounts="))
    assert {f"{Path.cwd()}:{Path.cwd()}", f"{run_dir}:{run_dir}", "/scratch:/scratch:ro"} <= set(mounts)
    assert command[-4] == "python"


def test_torch_is_told_its_place_in_the_words_of_torchrun() -> None:
    """Variables as a step of two nodes with four tasks each sets them."""
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    }
    told = torchrun_environment(slurm, "29500")
    assert told == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "29500",
    }
    assert torchrun_environment(slurm | {"MASTER_ADDR": "node-ib"}, "1")["MASTER_ADDR"] == "node-ib"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster.time=soon"],
            r"cluster\.time: got 'soon'; expected a time such as 2h or 90m, or as Slurm writes it, in quotes",
        ),
        (["cluster.time=240"], r"cluster\.time: got 240; expected a time"),
        (["+cluster.times={phase-3: '1:00:00'}"], r"times\.phase-3: no such job"),
        (["+cluster.times={phase-09: '1:00:00'}"], r"cluster\.times\.phase-09: there are 3 phases"),
        (["cluster.sbatch=['--time=1']"], r"'time' is decided by the other keys"),
        (["cluster.sbatch=['exclusive']"], r"expected one option of sbatch"),
        (["+cluster.environment={A-B: x}"], r"environment\.A-B: not a name of a variable"),
        (["cluster.container.mounts=['/a']"], r"container\.mounts: got '/a'; expected SOURCE:TARGET"),
        (["cluster.container.image=/absent.sqsh"], r"cluster\.container\.image: /absent\.sqsh does not exist"),
        (["cluster.nodes=0"], r"cluster\.nodes"),
        (["cluster.partitoin=x"], r"cluster\.partitoin: no such key.*Did you mean 'cluster\.partition'"),
        (["cluster.nodes=3"], r"phase 1: tokens_per_step.*3 ranks cannot share evenly"),
        (["parallel.tensor_parallel=2"], r"cluster\.nodes: 1 nodes make 1 processes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(overrides: list[str], message: str) -> None:
    on_cpus = ["cluster=slurm", "cluster.gpus_per_node=0", "parallel.device=cpu"]
    with pytest.raises(UserError, match=message):
        check_cluster(parse(compose([*on_cpus, *overrides])))


def test_keys_of_a_cluster_need_a_cluster() -> None:
    with pytest.raises(UserError, match=r"cluster\.partition: .*cluster=slurm"):
        compose(["cluster.partition=gpu"])
    with pytest.raises(UserError, match=r"cluster\.times: .*\+cluster\.times="):
        compose(["cluster=slurm", "cluster.times={data: '30'}"])


def test_a_dry_run_prints_every_script_and_needs_no_slurm(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    chosen = ("cluster=slurm", "cluster.gpus_per_node=0", "parallel.device=cpu", f"run.dir={tmp_path / 'run'}")
    run_stages(make_config(*chosen, "stage=all", "cluster.dry_run=true"))
    printed = capsys.readouterr().out
    for path in (tmp_path / "run" / "slurm").glob("*.sh"):
        assert path.read_text() in printed + "\n"
    assert printed.count("==> sbatch --dependency=afterok:<job of ") == 5
    with pytest.raises(UserError, match=r"no `sbatch` on this machine.*cluster\.dry_run=true"):
        run_stages(make_config(*chosen, "stage=all"))
    assert ChainRecord.read(tmp_path / "run") is None


def test_a_chain_and_its_notes_are_read_back_and_damage_is_nothing(tmp_path: Path) -> None:
    chain = ChainRecord("python launcher.py", "now", [Job("data", 7, None), Job("phase-01", 8, 7)])
    chain.write(tmp_path)
    assert ChainRecord.read(tmp_path) == chain and chain.ids == [7, 8]
    note = JobNote(8, "requeued", "n1", 1.5, "stopped", 4096, 1)
    note.write(tmp_path, "phase-01")
    assert JobNote.read(tmp_path, "phase-01") == note
    for path in (tmp_path / "slurm").iterdir():
        path.write_text("{")
    assert ChainRecord.read(tmp_path) is None and JobNote.read(tmp_path, "phase-01") is None


def test_a_job_that_never_gets_on_is_not_requeued_for_ever(
    prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's answers are stood in for by two programs: here it is the counting that is looked at."""
    run_dir, programs = tmp_path / "run", tmp_path / "bin"
    programs.mkdir()
    for name, answer in (("squeue", "5|RUNNING|None|now|1:00"), ("scontrol", f"$(echo $* >> {tmp_path}/asked)")):
        (programs / name).write_text(f'#!/bin/sh\necho "{answer}"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    config = make_config("cluster=slurm", "cluster.gpus_per_node=0", "parallel.device=cpu", f"run.dir={run_dir}")
    shutil.copytree(prepared / "data", run_dir / "data")

    def stop_again() -> int:
        job = RunningJob(run_dir, Task("train", 1), 5, config)
        job.note("running")
        return job.stopped(Stopped("phase-01: the state is saved.", None))

    assert [stop_again() for _ in range(3)] == [1, 1, 1]
    assert JobNote.read(run_dir, "phase-01").state == "failed"
    assert "cluster.time is too short" in JobNote.read(run_dir, "phase-01").message
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 5"] * 2
    assert not CheckpointStore(run_dir / "checkpoints").list()


def test_the_status_of_a_local_run_needs_no_slurm(
    prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config(f"run.dir={tmp_path / 'run'}")
    rows = status_rows(config)
    assert [row.task for row in rows] == ["data", "phase-01", "phase-02", "phase-03", "validate", "export"]
    assert {row.state for row in rows} == {"not begun"} and {row.job_id for row in rows} == {None}
    shutil.copytree(prepared / "data", tmp_path / "run" / "data")
    assert [row.state for row in status_rows(config)][:2] == ["done", "not begun"]
    assert not (REPO_DIR / "slurm").exists()


def test_a_part_of_the_curriculum_is_submitted_only_after_the_phases_before_it(
    prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    shutil.copytree(prepared / "data", tmp_path / "run" / "data")
    chosen = ("cluster=slurm", "cluster.gpus_per_node=0", "parallel.device=cpu", "cluster.dry_run=true")
    with pytest.raises(UserError, match=r"phases=2-3: phase-01 is not done"):
        run_stages(make_config(*chosen, f"run.dir={tmp_path / 'run'}", "stage=[data,train]", "phases=2-3"))
    run_stages(make_config(*chosen, f"run.dir={tmp_path / 'run'}", "stage=train", "phases=1-2"))
    scripts = {path.stem: path.read_text() for path in (tmp_path / "run" / "slurm").glob("*.sh")}
    assert set(scripts) == {"phase-01", "phase-02"}
    assert "--after" not in scripts["phase-01"] and scripts["phase-02"].endswith("phase-02 --after phase-01\n")
