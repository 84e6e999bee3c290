"""Slurm's own commands, whose refusals become the user's."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from yxanul_nemo.errors import UserError

FIELDS = ("%i", "%T", "%r", "%S", "%L")
ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
})  # fmt: skip


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    """As squeue's long form: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
    reason: str = ""
    """Why it waits or has failed."""
    starts: str = ""
    """When it began, or is expected to."""
    left: str = ""
    """What is left of its time limit."""

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.state not in ENDED


def slurm(*arguments: object) -> str:
    """What a command of Slurm prints; raises UserError if it is absent or refuses."""
    command = [str(argument) for argument in arguments]
    if shutil.which(command[0]) is None:
        raise UserError(
            "cluster.scheduler",
            f"is slurm, but there is no `{command[0]}` on this machine",
            "a machine from which jobs are submitted",
            "Log in to the cluster, or see the scripts with cluster.dry_run=true.",
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        fix = (
            "Does the cluster have such GPUs? cluster.gpus_per_node=0 asks for none." if "gres" in said.lower() else ""
        )
        raise UserError(f"`{' '.join(command)}`", f"ended with code {done.returncode}: {said}", fix=fix)
    return done.stdout


def submit(script: Path, after: int | None, hold: bool) -> int:
    """Hand a script to sbatch; the job's number.

    Args:
        after: job that must have succeeded before.
        hold: whether it waits for `release`.
    """
    options = ["--parsable"]
    if after is not None:
        options.append(f"--dependency=afterok:{after}")
    if hold:
        options.append("--hold")
    return int(slurm("sbatch", *options, script).partition(";")[0])


def release(job: int) -> None:
    """Let a held job go."""
    slurm("scontrol", "release", job)


def requeue(job: int) -> None:
    """End a running job and put it back into the queue."""
    slurm("scontrol", "requeue", job)


def cancel(jobs: list[int]) -> None:
    """End jobs, waiting or running."""
    slurm("scancel", *jobs)


def states_of(jobs: list[int]) -> dict[int, JobState]:
    """What Slurm still knows of these jobs: those in its queue, and ended ones for some minutes or by its accounting."""
    if not jobs:
        return {}
    numbers = ",".join(map(str, jobs))
    try:
        said = slurm("squeue", "--noheader", "--states=all", f"--jobs={numbers}", f"--format={'|'.join(FIELDS)}")
    except UserError as error:
        # What squeue says of one number that it has forgotten; of several it leaves that one out.
        if "Invalid job id" not in error.problem:
            raise
        said = ""
    known = {}
    for line in said.splitlines():
        number, *rest = line.strip().split("|")
        if number.isdigit() and int(number) in jobs:
            known[int(number)] = JobState(*rest)
    missing = [job for job in jobs if job not in known]
    return known | (_accounted(missing) if missing else {})


def _accounted(jobs: list[int]) -> dict[int, JobState]:
    """Of jobs that ended long ago, where the cluster keeps accounts."""
    try:
        said = slurm("sacct", "-n", "-P", "-X", f"--jobs={','.join(map(str, jobs))}", "--format=JobIDRaw,State")
    except UserError:
        # No accounting on this cluster; the run's own notes tell how its jobs ended.
        return {}
    states = {}
    for line in said.splitlines():
        number, _, state = line.partition("|")
        # "CANCELLED by 1000"
        if number.isdigit() and state:
            states[int(number)] = JobState(state.split()[0])
    return states
