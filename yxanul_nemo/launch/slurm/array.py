"""A sweep as one job array of Slurm: each task trains one run to its end and goes back into the queue when its time is over."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.launch.arms import Arm
from yxanul_nemo.launch.slurm import commands
from yxanul_nemo.launch.slurm.script import options
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.log import logger

SCRIPT_NAME = "sweep.sh"


def submit_array(folder: Path, config: RunConfig, arms: Sequence[Arm]) -> None:
    """Write the array's script and submit it, or print it with `cluster.dry_run`."""
    script = folder / SCRIPT_NAME
    with disk_errors(folder, "writing the script of a job array"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(script, render_array(folder, config, arms))
    if config.cluster.dry_run:
        print(f"{script.read_text(encoding='utf-8')}\n{len(arms)} tasks; nothing was submitted (cluster.dry_run)")
        return
    job = commands.submit(script, after=None, hold=False)
    logger.info(
        "job array %d: %d runs; when they are done, the same command without cluster=slurm shows the table and makes the report",
        job,
        len(arms),
    )


def render_array(folder: Path, config: RunConfig, arms: Sequence[Arm]) -> str:
    """Return the script: what a training job asks for, for as many tasks as there are runs."""
    asked = [
        line for line in options(config, Task("train", 1)) if not line.startswith(("--output", "--job-name", "--kill"))
    ]
    # A task trains a whole run in one process for each GPU of its node; the data is prepared by whichever task is first.
    lines = ["#!/bin/bash", f"# {len(arms)} runs of a sweep, a task each"]
    lines += [f"#SBATCH {line}" for line in asked]
    lines += [
        f'#SBATCH --job-name="{config.run.name}/sweep"',
        f'#SBATCH --output="{folder.absolute()}/sweep-%A_%a.out"',
        f"#SBATCH --array=0-{len(arms) - 1}",
        "",
    ]
    lines += [f"module load {shlex.quote(module)}" for module in config.cluster.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in config.cluster.environment.items()]
    lines += config.cluster.setup
    requeue = config.cluster.requeue
    lines.append("case $SLURM_ARRAY_TASK_ID in")
    for number, arm in enumerate(arms):
        command = [*arm.command(arm.stages), "cluster.scheduler=local"]
        lines.append(f"{number}) run={shlex.quote(str(arm.folder))}; set -- {shlex.join(command)} ;;")
    lines += [
        "esac",
        'mkdir -p "$run"',
        "# One task at a time prepares what they share.",
        f"exec 9> {shlex.quote(str(folder / '.preparing'))}",
        "flock 9",
        '"${@/#stage=*/stage=[fetch,data]}" || exit',
        "flock -u 9",
        '"$@" &',
        "launcher=$!",
        "trap 'kill -USR1 $launcher' USR1",
        "wait $launcher",
        "# A second time, where the first was ended by the signal: the launcher saves.",
        "wait $launcher",
        "code=$?",
        *(
            ['if [ -f "$run/preempted" ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"; fi']
            if requeue
            else []
        ),
        "exit $code",
        "",
    ]
    return "\n".join(lines)
