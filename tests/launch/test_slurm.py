"""Chains of jobs on a real Slurm: run to their end, stopped and requeued, failing in the middle, cancelled; all at the same time."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.launching import FAULTS_DIR, REPO_DIR, launch, state
from tests.launch.slurm_cluster import SlurmCluster, missing_programs
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.slurm import commands
from yxanul_nemo.launch.slurm.record import ChainRecord, JobNote
from yxanul_nemo.launch.stages import run_stages
from yxanul_nemo.launch.status import Row, show_status, status_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"needs Slurm (apt-get install slurm-wlm munge): no {', '.join(missing_programs())}",
    ),
]
ON_CPUS = ("cluster=slurm", "cluster.gpus_per_node=0", "parallel.device=cpu")
PATIENCE_SECONDS = 900
STEPS = {1: 8, 2: 6, 3: 8}
TASKS = ("data", "phase-01", "phase-02", "phase-03", "validate", "export")
PHASE_2_MIDDLE = 6144
"""Tokens at a checkpoint inside phase 2 of the small demo."""
PHASE_1_MIDDLE = 2048


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} came")
        time.sleep(0.05)


def stop_at(tokens: int) -> tuple[str, ...]:
    """Overrides by which a rank stops when it is about to commit the checkpoint after so many tokens; training waits for that."""
    return (
        "checkpoint.asynchronous=false",
        f"+cluster.environment.YXANUL_TEST_STOP_AT=tokens_{tokens:015d}",
        f"+cluster.environment.PYTHONPATH={FAULTS_DIR}",
    )


def stopped_rank(run_dir: Path) -> int:
    """Wait for a rank of a run that has stopped at such a place; its process id."""
    found: list[int] = []

    def search() -> bool:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if b"yxanul_nemo.launch.slurm.rank" in command and str(run_dir).encode() in command:
                found.extend([int(path.name)] if state(int(path.name)) == "T" else [])
        return bool(found)

    wait_for(search, f"stopped rank of {run_dir}")
    return found[0]


class Chains:
    """Four runs on one cluster, submitted at once and then disturbed; tests look at what came of each."""

    def __init__(self, folder: Path, prepared: Path, make_config: Callable[..., RunConfig]):
        self.make_config = make_config
        self.whole, self.broken, self.ended = (folder / name for name in ("whole", "broken", "ended"))
        for run_dir in (self.broken, self.ended):
            for part in ("data", "tokenizer"):
                shutil.copytree(prepared / part, run_dir / part)

    def submit(self) -> None:
        """The first by the command itself."""
        self.command = ("stage=all", *ON_CPUS, f"run.dir={self.whole}", *stop_at(PHASE_2_MIDDLE))
        self.submitted = launch(*self.command)
        # One process on each of two nodes; what phase 1 has saved is gone when phase 2 begins.
        away = f'[ "$SLURM_JOB_NAME" != demo/phase-02 ] || mv {self.broken}/checkpoints {self.broken}/away'
        run_stages(self.config(self.broken, "stage=all", "cluster.nodes=2", f"cluster.setup=['{away}']"))
        run_stages(self.config(self.ended, "stage=[train,export]", *stop_at(PHASE_1_MIDDLE)))
        self.queued = {run_dir: self.rows(run_dir) for run_dir in (self.whole, self.broken, self.ended)}

    def disturb(self) -> None:
        """One rank is cancelled in the middle of a save, and another's job told to stop as by its time limit."""
        stopped_rank(self.ended)
        run_stages(self.config(self.ended, "stage=cancel"))
        rank, job = stopped_rank(self.whole), self.job(self.whole, "phase-02")
        commands.slurm("scancel", "--batch", "--signal=USR1", job)
        log = self.whole / "logs" / "phase-02.log"
        # The step that the signal meets is the one after the save, as in training.
        wait_for(lambda: pending(rank, signal.SIGUSR1), "signal at the rank")
        os.kill(rank, signal.SIGCONT)
        wait_for(lambda: "stopped by SIGUSR1" in log.read_text(), "stop of the rank")

    def wait(self) -> None:
        """Until nothing is left in the queue."""
        wait_for(lambda: not commands.slurm("squeue", "--noheader"), "end of all jobs")

    def config(self, run_dir: Path, *overrides: str) -> RunConfig:
        return self.make_config(*ON_CPUS, f"run.dir={run_dir}", *overrides)

    def rows(self, run_dir: Path) -> dict[str, Row]:
        return {row.task: row for row in status_rows(self.config(run_dir))}

    def job(self, run_dir: Path, task: str) -> int:
        return next(job.job_id for job in ChainRecord.read(run_dir).jobs if job.task == task)

    def log(self, run_dir: Path, task: str) -> str:
        return (run_dir / "slurm" / f"{task}-{self.job(run_dir, task)}.out").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chains(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, make_config: Callable[..., RunConfig]
) -> Iterator[Chains]:
    with SlurmCluster(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO_DIR)
        patch.setattr(sys, "argv", ["launcher.py", "recipe=demo", "stage=all", "cluster=slurm"])
        made = Chains(tmp_path_factory.mktemp("slurm"), prepared, make_config)
        made.submit()
        made.disturb()
        made.wait()
        yield made


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process has a signal waiting for it."""
    status = Path(f"/proc/{pid}/status").read_text()
    waiting = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask & 1 << number - 1 for mask in waiting)


def newest(run_dir: Path) -> Checkpoint:
    return CheckpointStore(run_dir / "checkpoints").list()[-1]


def test_the_chain_is_in_the_queue_job_after_job(chains: Chains) -> None:
    assert chains.submitted.returncode == 0, chains.submitted.stdout
    jobs = ChainRecord.read(chains.whole).jobs
    assert tuple(job.task for job in jobs) == TASKS
    assert [job.after for job in jobs] == [None, *(job.job_id for job in jobs[:-1])]
    assert [row.state for row in chains.queued[chains.whole].values()][1:] == ["waiting"] * 5
    assert chains.queued[chains.whole]["data"].state in ("running", "queued", "ending", "done")
    # All at once: the others' first jobs do not wait for it.
    ids = [chains.job(run_dir, "phase-01") for run_dir in (chains.whole, chains.broken, chains.ended)]
    assert len(set(ids)) == 3
    assert chains.queued[chains.broken]["phase-02"].state == "waiting"
    assert chains.queued[chains.broken]["data"].job_id is None, "its corpus was prepared already"


def test_a_chain_runs_from_text_to_export(chains: Chains) -> None:
    rows = chains.rows(chains.whole)
    assert {task: row.state for task, row in rows.items()} == dict.fromkeys(TASKS, "done"), chains.log(
        chains.whole, "phase-02"
    )
    assert [rows[f"phase-0{number}"].tokens for number in (1, 2, 3)] == [4096, 6144, 8192]
    assert all(rows[f"phase-0{number}"].tokens_per_second > 0 for number in (1, 2, 3))
    assert newest(chains.whole).phase_end and newest(chains.whole).phase == 3
    assert {path.name for path in (chains.whole / "export").iterdir()} == {"hf", "model.nemo", "export.json"}


def test_a_job_told_to_stop_goes_on_from_the_same_token(chains: Chains) -> None:
    log = chains.log(chains.whole, "phase-02")
    at, step = PHASE_2_MIDDLE + 1024, 3
    assert f"stopped by SIGUSR1 at {at:,} tokens, saved" in log
    assert "goes back into the queue" in log
    assert f"from step {step}" in log
    job = chains.job(chains.whole, "phase-02")
    assert "Restarts=1" in commands.slurm("scontrol", "show", "job", job)
    records = [json.loads(line) for line in (chains.whole / "metrics.jsonl").read_text().splitlines()]
    for number, steps in STEPS.items():
        assert sum(record["steps"] for record in records if record["phase"] == number) == steps
    assert JobNote.read(chains.whole, "phase-02").state == "done"
    assert not (chains.whole / "preempted").exists()


def test_what_is_done_is_not_submitted_again(chains: Chains) -> None:
    done = launch(*chains.command)
    assert done.returncode == 0 and "nothing to submit" in done.stdout, done.stdout


def test_ranks_on_several_nodes_train_together(chains: Chains) -> None:
    assert "8 steps of 512 tokens = 2 ranks x 1 x micro-batch 16" in chains.log(chains.broken, "phase-01")
    assert {path.name for path in (chains.broken / "away").glob("*/rank_*")} == {
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    }
    shown = commands.slurm("scontrol", "show", "job", chains.job(chains.broken, "phase-01"))
    assert "NodeList=n[1-2]" in shown


def test_a_failure_ends_the_chain_and_says_how_to_go_on(chains: Chains, capsys: pytest.CaptureFixture[str]) -> None:
    job, log = chains.job(chains.broken, "phase-02"), chains.log(chains.broken, "phase-02")
    assert "phase-01 is not done, by its committed checkpoints and results" in log
    assert f"job {job} (phase-02 of {chains.broken}) failed" in log
    assert f"slurm/phase-02-{job}.out" in log
    again = f"cd {REPO_DIR} && python launcher.py recipe=demo stage=all cluster=slurm"
    assert f"go on: {again}" in log and "Traceback" not in log
    rows = chains.rows(chains.broken)
    assert [rows[task].state for task in TASKS[2:]] == ["failed", "cancelled", "cancelled", "cancelled"]
    show_status(chains.config(chains.broken))
    shown = capsys.readouterr().out
    assert "phase-01 is not done" in shown and "to go on: python launcher.py recipe=demo stage=all" in shown

    (chains.broken / "away").rename(chains.broken / "checkpoints")
    try:
        run_stages(chains.config(chains.broken, "stage=all", "cluster.nodes=2", "cluster.dry_run=true"))
    finally:
        (chains.broken / "checkpoints").rename(chains.broken / "away")
    printed = capsys.readouterr().out
    scripts = {path.stem for path in (chains.broken / "slurm").glob("*.sh")}
    assert scripts == {"phase-02", "phase-03", "validate", "export"}, "only what is missing"
    assert "4 jobs; nothing was submitted" in printed
    assert not commands.slurm("squeue", "--noheader")


def test_a_cancelled_chain_has_saved_and_stays_away(chains: Chains) -> None:
    states = commands.states_of(ChainRecord.read(chains.ended).ids)
    assert {job.state for job in states.values()} == {"CANCELLED"}
    assert newest(chains.ended).tokens >= PHASE_1_MIDDLE and not newest(chains.ended).phase_end
    rows = chains.rows(chains.ended)
    assert rows["phase-01"].state == "cancelled" and rows["phase-01"].tokens == newest(chains.ended).tokens
    assert "goes back" not in chains.log(chains.ended, "phase-01")
    with pytest.raises(UserError, match="has no jobs in the queue"):
        run_stages(chains.config(chains.ended, "stage=cancel"))


def test_one_chain_at_a_time_and_slurms_refusals_are_the_users(chains: Chains) -> None:
    with pytest.raises(UserError, match=r"sbatch.*[Ii]nvalid partition"):
        run_stages(chains.config(chains.ended, "stage=train", "cluster.partition=absent"))
    nowhere = ("stage=train", "cluster.sbatch=['--begin=now+1hour']")
    run_stages(chains.config(chains.ended, *nowhere))
    assert chains.rows(chains.ended)["phase-01"].state in ("queued", "queued (BeginTime)")
    with pytest.raises(UserError, match="has jobs in the queue already"):
        run_stages(chains.config(chains.ended, *nowhere))
    run_stages(chains.config(chains.ended, "stage=cancel"))
    assert not commands.slurm("squeue", "--noheader")


def test_slurm_reads_the_options_of_a_script_as_meant(chains: Chains, tmp_path: Path) -> None:
    """With a folder whose name has a space and a percent sign; the script itself fails, before the launcher."""
    run_dir = tmp_path / "a run 100%j"
    for part in ("data", "tokenizer"):
        shutil.copytree(chains.ended / part, run_dir / part)
    asked = (
        "cluster.time=1-02:00:00",
        "cluster.cpus_per_task=2",
        "cluster.nodes=2",
        "cluster.setup=['echo here', 'exit 3']",
    )
    run_stages(chains.config(run_dir, "stage=train", "phases=1", *asked))
    chains.wait()
    shown = commands.slurm("scontrol", "show", "job", chains.job(run_dir, "phase-01"))
    fields = dict(field.split("=", 1) for field in shown.split() if "=" in field)
    assert fields["TimeLimit"] == "1-02:00:00" and fields["CPUs/Task"] == "2" and fields["NumNodes"] == "2"
    assert fields["Requeue"] == "1" and fields["JobName"] == "demo/phase-01"
    assert chains.log(run_dir, "phase-01") == "here\n"
    assert chains.rows(run_dir)["phase-01"].state == "failed"
