"""One rank that srun has started: `python -m yxanul_nemo.launch.slurm.rank PORT RUN_DIR TASK`.

It tells torch about its place in the words of torchrun, and then is a worker like any other.
"""

import os
import sys
from collections.abc import Mapping


def torchrun_environment(slurm: Mapping[str, str], port: str) -> dict[str, str]:
    """What torch.distributed reads, from what srun sets in each task of a step.

    The address is that of the machine that called srun, which is the job's first node, as rank 0's is; one that was set before
    (`cluster.environment`) counts more.
    """
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0],
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or slurm["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": port,
    }


def main() -> int:
    """Exit code of the worker."""
    port = sys.argv.pop(1)
    os.environ.update(torchrun_environment(os.environ, port))
    from yxanul_nemo.launch.worker import main as work

    return work()


if __name__ == "__main__":
    sys.exit(main())
