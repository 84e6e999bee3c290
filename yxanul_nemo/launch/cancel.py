"""`stage=cancel`: end a run's jobs, or its launcher on this machine; what is at work saves first."""

import os
import signal
import time

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.slurm import commands
from yxanul_nemo.launch.slurm.record import ChainRecord
from yxanul_nemo.lock import running_launcher
from yxanul_nemo.log import logger

WAIT_SECONDS = 60.0
POLL_SECONDS = 1.0


def cancel_run(config: RunConfig) -> None:
    """End what is queued or at work in the run's folder.

    Slurm sends SIGTERM, upon which a training job saves, and ends what is left after its KillWait (30 seconds unless the cluster
    says otherwise); a checkpoint appears whole or not at all.

    Raises:
        UserError: there is nothing to end.
    """
    run_dir = config.run.dir
    chain = ChainRecord.read(run_dir)
    states = commands.states_of(chain.ids) if chain else {}
    live = [job for job in chain.jobs if job.job_id in states and states[job.job_id].is_live] if chain else []
    if live:
        # From the end, so that none of them starts because the one before it has gone.
        commands.cancel([job.job_id for job in reversed(live)])
        logger.info("ending %s", ", ".join(f"job {job.job_id} ({job.task})" for job in live))
        _wait([job.job_id for job in live])
    elif (owner := running_launcher(run_dir)) is not None:
        os.kill(owner.pid, signal.SIGTERM)
        logger.info("told %s to save and end", owner)
    else:
        raise UserError(run_dir, "has no jobs in the queue, and no launcher of this machine is at work in it")


def _wait(jobs: list[int]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        live = [job for job, state in commands.states_of(jobs).items() if state.is_live]
        if not live:
            logger.info("ended; the command that began the run goes on from what is saved")
            return
        time.sleep(POLL_SECONDS)
    logger.info("job %s is still ending; stage=status shows when it is gone", ", ".join(map(str, live)))
