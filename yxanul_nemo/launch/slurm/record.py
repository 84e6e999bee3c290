"""What a run's folder keeps of its jobs: `slurm/chain.json`, the jobs in order, and a note of each job's last begin and end."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.json_files import parse_json
from yxanul_nemo.run_folder import RunFolder

CHAIN_VERSION = 1


@dataclass(frozen=True)
class Job:
    """One submitted job."""

    task: str
    """data, phase-01, ..., validate or export."""
    job_id: int
    after: int | None
    """Number of the job that must succeed before."""


@dataclass(frozen=True)
class ChainRecord:
    """The jobs that a command has submitted, in order."""

    command: str
    """The one that submitted them, and that goes on after a failure."""
    submitted: str
    """When, as people write it."""
    jobs: list[Job] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """That of a run; None where no jobs were submitted or the file was damaged."""
        try:
            kept = parse_json(RunFolder(run_dir).slurm_chain.read_text(encoding="utf-8"))
            return cls(kept["command"], kept["submitted"], [Job(**job) for job in kept["jobs"]])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, run_dir: Path) -> None:
        """Replace that of a run."""
        head = {"format": "yxanul-slurm-chain", "format_version": CHAIN_VERSION}
        write_json_atomic(RunFolder(run_dir).slurm_chain, head | asdict(self))

    @property
    def ids(self) -> list[int]:
        """The jobs' numbers."""
        return [job.job_id for job in self.jobs]


@dataclass(frozen=True)
class JobNote:
    """How a task's last job stands, by its own word."""

    job_id: int
    state: str
    """running, done, failed, stopped or requeued."""
    host: str
    time_unix: float
    message: str = ""
    progress: int = 0
    """What was there at the end, in the task's own measure (`job.progress`)."""
    idle_restarts: int = 0
    """Requeues in a row without progress."""

    @classmethod
    def read(cls, run_dir: Path, task: str) -> Self | None:
        """The last note of a task; None where there is none."""
        try:
            kept: dict[str, Any] = parse_json(RunFolder(run_dir).slurm_note(task).read_text(encoding="utf-8"))
            return cls(**kept)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, run_dir: Path, task: str) -> None:
        """Replace the note of a task."""
        write_json_atomic(RunFolder(run_dir).slurm_note(task), asdict(self))
