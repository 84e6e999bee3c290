"""The stages of the pipeline in order, each doing only what is not done yet. Light: heavy work happens in worker processes."""

import os
import signal
import time
from typing import Any

from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import selected_phases
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.files import write_json_atomic, write_text_atomic
from yxanul_nemo.launch.interrupts import BY_HAND, Interrupted, StopSignals
from yxanul_nemo.launch.lone_stages import LONE_STAGES, lone_stage, run_lone_stage
from yxanul_nemo.launch.notices import notify
from yxanul_nemo.launch.processes import Workers
from yxanul_nemo.launch.run_state import RunState
from yxanul_nemo.launch.tasks import STAGES, Task
from yxanul_nemo.lock import RunLock
from yxanul_nemo.log import configure_logging, logger
from yxanul_nemo.machine.environment import write_environment
from yxanul_nemo.machine.surroundings import make_bearable
from yxanul_nemo.validation.record import find_result, result_table

LEFTOVER_SECONDS = 60.0
"""How long a repeated command waits for the worker of a launcher that was killed, which saves and ends."""


class StageFailed(Exception):
    """A worker failed; it has said why. `exit_code` is what the launcher ends with."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(Exception):
    """The run was asked to stop. `exit_code` is 0 for a scheduler's signal, and the shell's 130 for Ctrl-C, 129 for a closed terminal."""

    def __init__(self, where: str, received: signal.Signals | None):
        name = received.name if received is not None else "a signal to its worker or a callback"
        super().__init__(f"stopped by {name} in {where} Repeat the command to go on.")
        self.exit_code = 128 + received if received in BY_HAND else 0


def selected_stages(stage: str | list[str]) -> list[str]:
    """The stages meant by `stage=...`, in pipeline order."""
    asked = [stage] if isinstance(stage, str) else list(stage)
    for name in asked:
        if name in LONE_STAGES:
            raise UserError("stage", f"is {asked}", f"{name} alone", f"Use stage={name} first, then the others.")
        if name not in (*STAGES, "all"):
            valid = ["all", *STAGES, *LONE_STAGES]
            if "," in name:
                raise UserError("stage", f"is '{name}'", f"several as a list: 'stage=[{name}]'")
            raise UserError("stage", f"no stage '{name}'", ", ".join(valid), nearest(name, valid))
    if not asked:
        raise UserError("stage", "is an empty list", f"all, or some of {', '.join(STAGES)}")
    return [name for name in STAGES if name in asked or "all" in asked]


def run_stages(config: RunConfig) -> None:
    """Run the configured stages.

    Raises:
        UserError: the user's mistake.
        StageFailed: a worker failed.
        Stopped: stopped on request; what is finished and the state of training are kept.
    """
    if (lone := lone_stage(config)) is not None:
        if not run_lone_stage(config, lone):
            raise StageFailed(f"stage={lone}: this recipe cannot run here, see above", exit_code=1)
        return
    stages = selected_stages(config.stage)
    selected_phases(config.phases, len(config.curriculum.phases))
    if config.cluster.scheduler == "slurm":
        from yxanul_nemo.launch.slurm.submit import submit_chain

        submit_chain(config, stages)
        return
    run_here(config, stages)
    logger.info("done: %s (stage=report makes a page about it)", config.run.dir)


def run_here(config: RunConfig, stages: list[str], after: Task | None = None) -> None:
    """Run stages on this machine, or within the job that this process is part of; `after` must be done. Raises as `run_stages`."""
    configure_logging()
    notes = make_bearable(os.environ)
    with StopSignals() as signals:
        try:
            with RunLock(config.run.dir, LEFTOVER_SECONDS) as lock:
                configure_logging(config.run.folder.log("launcher"))
                for note in notes:
                    logger.warning("%s", note)
                config.run.folder.preempted.unlink(missing_ok=True)
                chain = Chain(config, stages, lock.fd, signals)
                try:
                    chain.run(after)
                except StageFailed as error:
                    notify(config, "failure", str(error))
                    raise
                finally:
                    chain.workers.close()
                    if signals.received not in (None, *BY_HAND):
                        marker = {"signal": signals.received.name, "time_unix": time.time()}
                        write_json_atomic(config.run.folder.preempted, marker)
                        notify(config, "preemption", f"stopped by {signals.received.name}; what was trained is saved")
            if chain.has_worked:
                notify(config, "end", f"done: {', '.join(stages)}")
        except Interrupted:
            raise Stopped("the launcher: what is finished is kept.", signals.received) from None


class Chain:
    """The chosen stages of one run: what is done, and workers for what is not."""

    def __init__(self, config: RunConfig, stages: list[str], lock_fd: int, signals: StopSignals):
        self.config, self.stages, self.signals = config, stages, signals
        self.state = RunState(config, stages)
        self.workers = Workers(config, lock_fd, signals)
        self._recorded = False
        self.has_worked = False
        """Whether there was anything left to do."""

    def run(self, after: Task | None = None) -> None:
        """Do what is not done, checking first what can be checked before anything is spent.

        Args:
            after: what must be done before, where another job was to do it.
        """
        state = self.state
        state.store.clean_temporaries()
        if after is not None and not state.is_done(after):
            raise UserError(
                self.config.run.dir,
                f"{after.name} is not done, by its committed checkpoints and results",
                f"all of {after.name} before what follows it",
                "Repeat the command that began this chain; it does what is missing.",
            )
        todo, has_data = state.todo(), state.has_data
        # It imports the tokenizers' libraries, which commands that only look do not need.
        from yxanul_nemo.fetch.stage import fetch_for_checks, fetch_sources, require_fetched

        if "fetch" in self.stages and (todo or not state.tasks):
            fetch_for_checks(self.config)
        state.check_before_data(todo)
        if "fetch" in self.stages:
            fetch_sources(self.config)
        if "data" in self.stages:
            require_fetched(self.config)
            if not has_data:
                self._write_records()
            if todo:
                self.workers.start_ahead(todo[0])
            # Late, so that stages which only look do without what reads and encodes text.
            from data_prep.prepare import run_data_stage

            run_data_stage(self.config)
        if todo or ("train" in self.stages and has_data):
            state.check_with_data(todo)
        if todo:
            self._write_records()
            self.workers.start_ahead(todo[0])
        shown = False
        for i, task in enumerate(state.tasks):
            if state.is_done(task):
                logger.info("%s: done already", task.name)
            else:
                self.has_worked = True
                self._run_task(task, after=next(iter(state.tasks[i + 1 :]), None))
                # The end of a phase has shown it.
                shown = task.kind == "train"
            if task.kind == "validate" and not shown:
                self._show_validation()

    def _write_records(self) -> None:
        if self._recorded:
            return
        self._recorded = True
        folder = self.config.run.folder
        with disk_errors(folder.root, "writing the run's records"):
            write_text_atomic(folder.config, to_yaml(self.config))
            write_environment(folder.environment)

    def _run_task(self, task: Task, after: Task | None) -> None:
        code = self.workers.run(task, after)
        if code not in (0, 2) and self.signals.received is None:
            logger.warning("%s %s; trying once more from the last good checkpoint", task.name, _ending(code))
            code = self.workers.run(task, after)
        if code == 2:
            raise StageFailed(f"{task.name} stopped, see above", exit_code=2)
        if self.signals.received is not None:
            kept = "the state is saved" if code == 0 else "training goes on from the last checkpoint"
            where = f"{task.name}: {kept}." if task.kind == "train" else f"{task.name}, which begins anew."
            raise Stopped(where, self.signals.received)
        if code != 0:
            tail = "\n".join(self.workers.last_lines)
            raise StageFailed(
                f"{task.name} failed twice (the last time it {_ending(code)}). "
                f"End of {self.workers.log_path(task)}:\n{tail}",
                exit_code=1,
            )
        if task.kind == "train" and not self.state.is_done(task):
            raise Stopped(f"{task.name}: the state is saved.", None)

    def _show_validation(self) -> None:
        newest = self.state.newest()
        result: dict[str, Any] | None = find_result(self.config, newest) if newest else None
        if result is not None:
            logger.info("validation after %s tokens:\n%s", f"{result['tokens_total']:,}", result_table(result))


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
