"""The sbatch script of a job: plain shell that a person can read, change and submit by hand."""

import shlex
import sys
from pathlib import Path

from yxanul_nemo.config.cluster import ClusterConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.machine.gpus import process_count
from yxanul_nemo.run_folder import RunFolder

JOB_MODULE = "yxanul_nemo.launch.slurm.job"


def script_path(config: RunConfig, task: Task) -> Path:
    """Where a task's script lies."""
    return config.run.folder.slurm_script(task.name)


def log_path(run_dir: Path, task: Task, job_id: int | str) -> Path:
    """What a job prints, all of its restarts in one file."""
    return RunFolder(run_dir.absolute()).slurm_log(task.name, job_id)


def render(config: RunConfig, task: Task, after: Task | None) -> str:
    """The script of a task's job.

    Args:
        after: the task that the job finds done, or refuses to start.
    """
    cluster = config.cluster
    lines = [f"#!/bin/bash{' -l' if cluster.modules else ''}", f"# {describe(config, task)}"]
    if after is not None:
        lines.append(
            f"# By hand: sbatch --dependency=afterok:<job of {after.name}> {shlex.quote(str(script_path(config, task)))}"
        )
    lines += [f"#SBATCH {option}" for option in options(config, task)]
    lines += ["", "set -e"]
    lines += [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    lines += cluster.setup
    command = [sys.executable, "-m", JOB_MODULE, str(config.run.dir), task.name]
    if after is not None:
        command += ["--after", after.name]
    if task.kind == "train":
        command += [f"--callback={path}" for path in config.callbacks]
    if config.notify.command is not None:
        command.append(f"--notify={config.notify.model_dump_json()}")
    lines += [
        "# exec: Slurm's signal goes to this process, and so to the launcher, which passes it on to the ranks that srun starts.",
        f"exec {shlex.join(command)}",
        "",
    ]
    return "\n".join(lines)


def describe(config: RunConfig, task: Task) -> str:
    """One line about a job, for people."""
    if task.kind != "train":
        return f"{config.run.name}: {task.name}"
    phases = plan_phases(config.curriculum)
    phase = phases[task.phase - 1]
    return (
        f"{config.run.name}: phase {task.phase} of {len(phases)}, seq_len {phase.seq_len}, {phase.steps:,} steps of "
        f"{phase.tokens_per_step:,} tokens"
    )


def options(config: RunConfig, task: Task) -> list[str]:
    """What a job asks of sbatch."""
    cluster = config.cluster
    output = log_path(config.run.dir, task, "\0")
    partition = cluster.data_partition or cluster.partition if task.kind == "data" else cluster.partition
    given = {
        "job-name": f"{config.run.name}/{task.name}",
        "partition": partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.times.get(task.name, cluster.time),
        **_resources(config, task),
        "mem": cluster.mem,
        "chdir": Path.cwd(),
        # Slurm replaces %j; a percent sign that is part of the folder's name is written twice.
        "output": str(output).replace("%", "%%").replace("\0", "%j"),
        "open-mode": "append",
        # To the launcher alone (B:); it tells the ranks when they can act on it.
        "signal": f"B:USR1@{cluster.signal_seconds}",
    }
    lines = [f"--{name}={_quoted(value)}" for name, value in given.items() if value is not None]
    lines.append("--requeue" if cluster.requeue else "--no-requeue")
    lines.append("--kill-on-invalid-dep=yes")
    return lines + cluster.sbatch


def _resources(config: RunConfig, task: Task) -> dict[str, object]:
    cluster, per_node = config.cluster, process_count(config)
    if task.kind == "data":
        return {"nodes": 1, "ntasks-per-node": 1, "cpus-per-task": _data_cpus(cluster, per_node)}
    single = task.kind == "export"
    on_node = 0 if config.parallel.device == "cpu" else cluster.gpus_per_node
    gpus = min(on_node, 1) if single else on_node
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    return {
        "nodes": 1 if single else cluster.nodes,
        "ntasks-per-node": 1 if single else per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "gpus-per-node": f"{kind}{gpus}" if gpus else None,
    }


def _data_cpus(cluster: ClusterConfig, per_node: int) -> int | None:
    if cluster.data_cpus is not None:
        return cluster.data_cpus
    return None if cluster.cpus_per_task is None else cluster.cpus_per_task * per_node


def _quoted(value: object) -> str:
    """As sbatch reads words in a script: in double quotes where there is space."""
    text = str(value)
    if any(sign in text for sign in "\"'\\\n"):
        raise UserError(
            "cluster",
            f"'{text}' has quotes, backslashes or line ends, which job scripts cannot carry",
            "a plainer name",
        )
    return f'"{text}"' if any(sign.isspace() or sign == "#" for sign in text) else text
