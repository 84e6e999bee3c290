"""`conf/cluster`: where the stages run: in this process's machine, or as jobs of a Slurm cluster."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from yxanul_nemo.config.base import DURATION, Section, duration_seconds
from yxanul_nemo.config.private_values import require_no_secret, require_no_secrets_in

TIME = re.compile(r"[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED")
JOB = re.compile(r"data|phase-[0-9]{2}|validate|export")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN_OPTIONS = frozenset({
    "job-name", "J", "output", "o", "error", "e", "chdir", "D", "dependency", "d", "kill-on-invalid-dep", "signal", "requeue",
    "no-requeue", "open-mode", "parsable", "partition", "p", "account", "A", "qos", "q", "time", "t", "nodes", "N",
    "ntasks-per-node", "ntasks", "n", "gpus-per-node", "cpus-per-task", "c", "mem", "constraint", "C", "array", "a", "wrap",
})  # fmt: skip
"""Options of sbatch that have a key here or that the chain depends on."""


def _time(value: object) -> object:
    if isinstance(value, str) and DURATION.fullmatch(value):
        minutes, seconds = divmod(round(duration_seconds(value)), 60)
        hours, minutes = divmod(minutes, 60)
        days, hours = divmod(hours, 24)
        return f"{days}-{hours:02d}:{minutes:02d}:{seconds:02d}" if days else f"{hours:02d}:{minutes:02d}:{seconds:02d}"
    # YAML reads an unquoted 12:30:00 as one number in base 60, and 90 could be meant in anything.
    if not isinstance(value, str) or not TIME.fullmatch(value):
        raise ValueError(
            f"got {value!r}; expected a time such as 2h or 90m, or as Slurm writes it, in quotes: "
            "'90' (minutes), '12:30:00' or '2-00:00:00'"
        )
    return value


def _option(value: object) -> object:
    if not isinstance(value, str) or not value.startswith("-") or "\n" in value:
        raise ValueError(f"got {value!r}; expected one option of sbatch on one line, as in '--exclusive'")
    name = value.lstrip("-").partition("=")[0].split()[0] if value.lstrip("-") else ""
    if name in OWN_OPTIONS:
        raise ValueError(f"got {value!r}; '{name}' is decided by the other keys of cluster or by the chain itself")
    return value


def _line(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # mem=0, account=1234, NCCL_IB_TIMEOUT: 22
        return str(value)
    if isinstance(value, str) and ("\n" in value or not value.strip()):
        raise ValueError(f"got {value!r}; expected a text on one line")
    return value


Time = Annotated[str, BeforeValidator(_time)]
Option = Annotated[str, BeforeValidator(_option)]
Line = Annotated[str, BeforeValidator(_line)]


class ContainerConfig(Section):
    """An image for the tasks, run by enroot through Slurm's pyxis plugin (`srun --container-image`)."""

    image: Line | None = None
    """A .sqsh file or an image of a registry (`nvcr.io#nvidia/pytorch:25.05-py3`); null: no container."""
    mounts: list[Line] = Field(default_factory=list)
    """`SOURCE:TARGET[:FLAGS]`, beside the working folder, the run's folder and the data's, which are always there."""
    python: Line = "python"
    """The interpreter inside the image."""


class ClusterConfig(Section):
    """Where stages run, and what a job asks the scheduler for."""

    scheduler: Literal["local", "slurm"] = "local"
    """`local`: here and now; `slurm`: as a chain of jobs, one for each stage and phase."""
    dry_run: bool = False
    """Write and print the job scripts, submit nothing."""
    partition: Line | None = None
    """Partition of the jobs; null: the cluster's default."""
    data_partition: Line | None = None
    """Partition of the data stage, which needs no GPU; null: as the others."""
    account: Line | None = None
    """Account that is charged."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have."""
    time: Time = "04:00:00"
    """Time limit of each job, in quotes. Before it is over a job saves, goes back into the queue and goes on later."""
    times: dict[str, Time] = Field(default_factory=dict)
    """Other limits by job: data, phase-01, phase-02, ..., validate, export."""
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    """So long before the time limit a job is told to save; Slurm may be up to 60 seconds early."""
    requeue: bool = True
    """Whether a job that was told to stop goes back into the queue by itself."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of each training and validation job."""
    gpus_per_node: int = Field(default=1, ge=0)
    """GPUs of each node; one process for each, unless `parallel.processes_per_node` says otherwise. 0: none are asked for."""
    gpu_type: Line | None = None
    """Kind of GPU where a cluster has several, as its administrators have named it."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores for each process; null: the cluster's default, which often is one."""
    data_cpus: int | None = Field(default=None, ge=1)
    """Cores of the data stage; null: as many as a node's processes get together."""
    mem: Line | None = None
    """Memory of each node, as in 200G; `0` is all of it; null: the cluster's default."""
    modules: list[Line] = Field(default_factory=list)
    """Loaded with `module load` at the start of each job."""
    environment: dict[str, Line] = Field(default_factory=dict)
    """Variables set in each job, beside those of the shell that submits it. They lie in files: keys and passwords are refused."""
    setup: list[Line] = Field(default_factory=list)
    """Lines of shell that each job's script runs first."""
    sbatch: list[Option] = Field(default_factory=list)
    """Further options of sbatch, a line each, as in `--exclusive`."""
    srun: list[Option] = Field(default_factory=list)
    """Further options of srun for the tasks, as in `--mpi=pmix`."""
    container: ContainerConfig = ContainerConfig()

    @model_validator(mode="after")
    def _names_are_right(self) -> "ClusterConfig":
        for job in self.times:
            if not JOB.fullmatch(job):
                raise ValueError(
                    f"times.{job}: no such job; expected data, phase-01, phase-02, ..., validate or export"
                )
        for name in self.environment:
            if not NAME.fullmatch(name):
                raise ValueError(f"environment.{name}: not a name of a variable")
            require_no_secret(f"environment.{name}", self.environment[name])
        for key in ("setup", "sbatch", "srun"):
            for line in getattr(self, key):
                require_no_secrets_in(key, line)
        for mount in self.container.mounts:
            if len(mount.split(":")) not in (2, 3):
                raise ValueError(f"container.mounts: got '{mount}'; expected SOURCE:TARGET or SOURCE:TARGET:FLAGS")
        return self
