"""The srun that starts a task's ranks inside a job. Light: it is part of the launcher."""

import sys
from pathlib import Path

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.machine.surroundings import free_port

RANK_MODULE = "yxanul_nemo.launch.slurm.rank"


def srun_command(config: RunConfig, ranks_per_node: int, ranks: int) -> list[str]:
    """Up to the interpreter and the module that ranks run; the worker's own arguments follow.

    Args:
        ranks_per_node: on a full node.
        ranks: 1, or a multiple of `ranks_per_node`.
    """
    cluster = config.cluster
    per_node = min(ranks, ranks_per_node)
    command = ["srun", f"--nodes={ranks // per_node}", f"--ntasks={ranks}", f"--ntasks-per-node={per_node}"]
    # One rank that fails ends the others at once, instead of leaving them in a collective until it times out.
    command += ["--kill-on-bad-exit=1", "--input=none"]
    if cluster.cpus_per_task is not None:
        # Since Slurm 22.05 srun does not take it over from the job.
        command.append(f"--cpus-per-task={cluster.cpus_per_task}")
    command += cluster.srun
    container = cluster.container
    if container.image is not None:
        mounts = [f"{folder}:{folder}" for folder in mounted_folders(config)] + container.mounts
        command += [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        command.append(f"--container-workdir={Path.cwd()}")
    python = sys.executable if container.image is None else container.python
    return [*command, python, "-m", RANK_MODULE, str(free_port())]


def mounted_folders(config: RunConfig) -> list[Path]:
    """What a container sees at the same place as the host: the working folder, the run's, the data's and the validation texts'."""
    wanted = [Path.cwd(), *(path.absolute() for path in (config.run.dir, config.data_dir, config.validation.dir))]
    wanted = [path for path in wanted if path.exists()]
    return [path for path in dict.fromkeys(wanted) if not any(other in path.parents for other in wanted)]
