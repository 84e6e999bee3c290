"""What a job runs: `python -m yxanul_nemo.launch.slurm.job RUN_DIR TASK [--after TASK] [--callback PATH]...`.

The stage that the task is, by the configuration that was kept when the chain was submitted; then a note of how it ended,
for `stage=status`, and, if the job was told to stop before it was through, back into the queue.
"""

import argparse
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.config.outputs import NotifyConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.slurm import commands
from yxanul_nemo.launch.slurm.record import ChainRecord, JobNote
from yxanul_nemo.launch.slurm.script import log_path
from yxanul_nemo.launch.stages import StageFailed, Stopped, run_here
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.log import logger
from yxanul_nemo.run_folder import RunFolder
from yxanul_nemo.streams import outlive_reader

MAX_IDLE_RESTARTS = 3
"""Requeues in a row without any progress, after which a time limit is taken to be too short."""


def main() -> int:
    """Exit code: 0 only if the task is done, because the jobs after it start by that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("task")
    parser.add_argument("--after")
    parser.add_argument("--callback", action="append", default=[], help="import path of a training callback")
    parser.add_argument("--notify", type=NotifyConfig.model_validate_json, default=NotifyConfig(), help="who is told")
    arguments = parser.parse_args()
    outlive_reader()
    task, job_id = Task.named(arguments.task), int(os.environ["SLURM_JOB_ID"])
    job = RunningJob(arguments.run_dir, task, job_id, callbacks=arguments.callback, notify=arguments.notify)
    try:
        config = job.load()
        job.note("running")
        run_here(config, [job.stage], Task.named(arguments.after) if arguments.after else None)
    except UserError as error:
        return job.failed(str(error), 2)
    except StageFailed as error:
        return job.failed(str(error), error.exit_code)
    except Stopped as stopped:
        return job.stopped(stopped)
    except Exception:  # noqa: BLE001 - the last frame: everything else is our failure and ends with its traceback
        traceback.print_exc()
        return job.failed("a failure of the launcher, see the traceback in the log", 1)
    job.note("done")
    return 0


@dataclass
class RunningJob:
    """The job that this process is, and its last words."""

    run_dir: Path
    task: Task
    job_id: int
    config: RunConfig | None = None
    callbacks: Sequence[str] = ()
    """Import paths of the user's callbacks, which no file of the run holds."""
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    """Who is told, which no file of the run holds either."""

    @property
    def stage(self) -> str:
        """The stage that the task is part of."""
        return self.task.kind

    def load(self) -> RunConfig:
        """The chain's configuration, with the stage that this job is for."""
        config = load_run_config(RunFolder(self.run_dir).slurm_config)
        choice: dict[str, Any] = {"stage": [self.stage], "callbacks": list(self.callbacks), "notify": self.notify}
        choice["phases"] = self.task.phase if self.stage == "train" else None
        self.config = config.model_copy(update=choice)
        return self.config

    def note(self, state: str, message: str = "") -> JobNote:
        """Keep how the job stands."""
        before = JobNote.read(self.run_dir, self.task.name)
        note = JobNote(self.job_id, state, socket.gethostname(), time.time(), message)
        if before is not None and before.job_id == self.job_id:
            note = replace(note, progress=before.progress, idle_restarts=before.idle_restarts)
        note.write(self.run_dir, self.task.name)
        return note

    def failed(self, problem: str, exit_code: int) -> int:
        """Tell what failed, where it is written and how to go on; the exit code."""
        chain = ChainRecord.read(self.run_dir)
        self.note("failed", problem)
        again = f"cd {Path.cwd()} && {chain.command}" if chain else "the command that submitted it"
        print(
            f"error: {problem}\n"
            f"job {self.job_id} ({self.task.name} of {self.run_dir}) failed; Slurm cancels the jobs that wait for it.\n"
            f"log:   {log_path(self.run_dir, self.task, self.job_id)}\n"
            f"go on: {again}",
            file=sys.stderr,
        )
        return exit_code

    def stopped(self, stopped: Stopped) -> int:
        """After a stop on request: back into the queue, unless Slurm is ending the job for good; the exit code."""
        print(stopped, file=sys.stderr)
        if self.config is None or not self._is_running():
            # Cancelled, over its limit, or preempted, after which Slurm itself requeues.
            self.note("stopped", str(stopped))
            return 1
        config = self.config
        if not config.cluster.requeue:
            return self.failed(f"{stopped} It was not requeued (cluster.requeue=false).", 1)
        note = self.note("requeued", str(stopped))
        now = progress(config, self.task)
        idle = note.idle_restarts + 1 if now == note.progress else 0
        if idle >= MAX_IDLE_RESTARTS:
            return self.failed(
                f"{self.task.name} was stopped {idle} times without getting on: cluster.time is too short for it.", 1
            )
        replace(note, progress=now, idle_restarts=idle).write(self.run_dir, self.task.name)
        logger.info("job %d goes back into the queue, to go on from what is saved", self.job_id)
        try:
            commands.requeue(self.job_id)
        except UserError as error:
            return self.failed(f"{stopped} It could not be requeued: {error}", 1)
        # Slurm ends this process about now; should it come to its end before, that must not look like success.
        return 1

    def _is_running(self) -> bool:
        """Whether Slurm still means the job to go on; not, if it cannot be asked."""
        try:
            state = commands.states_of([self.job_id]).get(self.job_id)
        except UserError as error:
            logger.warning("%s", error)
            return False
        return state is not None and state.state == "RUNNING"


def progress(config: RunConfig, task: Task) -> int:
    """How far a task has come, in a measure that grows when it gets on: committed tokens, or shards of the corpus."""
    if task.kind == "train":
        checkpoints = CheckpointStore.of_run(config, verify="size").list()
        return checkpoints[-1].tokens if checkpoints else 0
    return sum(1 for _ in config.data_dir.rglob("*.bin")) if task.kind == "data" else 0


if __name__ == "__main__":
    sys.exit(main())
