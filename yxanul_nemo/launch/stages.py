"""The stages of the pipeline in order, each doing only what is not done yet. Light: heavy work happens in worker processes."""

import signal
import time
from typing import Any

from data_prep.manifest import MANIFEST_NAME, load_manifest
from data_prep.prepare import run_data_stage
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.export.gguf_rules import require_expressible
from yxanul_nemo.export.record import is_exported
from yxanul_nemo.files import write_json_atomic, write_text_atomic
from yxanul_nemo.launch.environment import write_environment
from yxanul_nemo.launch.interrupts import Interrupted, StopSignals
from yxanul_nemo.launch.lock import RunLock
from yxanul_nemo.launch.lone_stages import LONE_STAGES, lone_stage, run_lone_stage
from yxanul_nemo.launch.processes import Task, Workers
from yxanul_nemo.log import configure_logging, logger
from yxanul_nemo.training.identity import expected_run
from yxanul_nemo.training.phases import check_enough_tokens, plan_phases, selected_phases, source_sizes
from yxanul_nemo.validation.early_stop import early_stop_tokens
from yxanul_nemo.validation.files import check_domain_files, check_heldout
from yxanul_nemo.validation.record import find_result, phase_result_path
from yxanul_nemo.validation.table import table

STAGES = ("data", "train", "validate", "export")
LEFTOVER_SECONDS = 60.0
"""How long a repeated command waits for the worker of a launcher that was killed, which saves and ends."""
PREEMPTED_NAME = "preempted"
"""File in the run's folder while the last command was stopped by a scheduler's signal."""


class StageFailed(Exception):
    """A worker failed; it has said why. `exit_code` is what the launcher ends with."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(Exception):
    """The run was asked to stop. `exit_code` is 0 for a scheduler's signal, and the shell's 130 for Ctrl-C."""

    def __init__(self, where: str, received: signal.Signals | None):
        name = received.name if received is not None else "a signal to its worker"
        super().__init__(f"stopped by {name} in {where} Repeat the command to go on.")
        self.exit_code = 128 + received if received == signal.SIGINT else 0


def selected_stages(stage: str | list[str]) -> list[str]:
    """The stages meant by `stage=...`, in pipeline order."""
    asked = [stage] if isinstance(stage, str) else list(stage)
    for name in asked:
        if name in LONE_STAGES:
            raise UserError("stage", f"is {asked}", f"{name} alone", f"Use stage={name} first, then the others.")
        if name not in (*STAGES, "all"):
            valid = ["all", *STAGES, *LONE_STAGES]
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
    configure_logging()
    with StopSignals() as signals:
        try:
            with RunLock(config.run.dir, LEFTOVER_SECONDS) as lock:
                configure_logging(config.run.dir / "logs" / "launcher.log")
                (config.run.dir / PREEMPTED_NAME).unlink(missing_ok=True)
                chain = Chain(config, stages, lock.fd, signals)
                try:
                    chain.run()
                finally:
                    chain.workers.close()
                    if signals.received not in (None, signal.SIGINT):
                        marker = {"signal": signals.received.name, "time_unix": time.time()}
                        write_json_atomic(config.run.dir / PREEMPTED_NAME, marker)
        except Interrupted:
            raise Stopped("the launcher: what is finished is kept.", signals.received) from None
    logger.info("done: %s", config.run.dir)


class Chain:
    """The chosen stages of one run: what is done, and workers for what is not."""

    def __init__(self, config: RunConfig, stages: list[str], lock_fd: int, signals: StopSignals):
        self.config, self.stages, self.signals = config, stages, signals
        self.store = CheckpointStore(
            config.run.dir / "checkpoints", config.checkpoint.keep_latest, config.checkpoint.verify
        )
        self.workers = Workers(config, lock_fd, signals)
        phases = selected_phases(config.phases, len(config.curriculum.phases)) if "train" in stages else []
        self.tasks = [Task("train", number) for number in phases]
        self.tasks += [Task(stage) for stage in ("validate", "export") if stage in stages]
        self._recorded = False
        self._newest_of: tuple[list[str], Checkpoint | None] = ([], None)

    def run(self) -> None:
        """Do what is not done, checking first what can be checked before anything is spent."""
        self.store.clean_temporaries()
        todo = [task for task in self.tasks if not self._is_done(task)]
        has_data = (self.config.data_dir / MANIFEST_NAME).is_file()
        self._check_before_data(todo)
        if "data" in self.stages:
            if not has_data:
                self._write_records()
            if todo:
                self.workers.start_ahead()
            run_data_stage(self.config)
        if todo or ("train" in self.stages and has_data):
            self._check_with_data(todo)
        if todo:
            self._write_records()
            self.workers.start_ahead()
        for i, task in enumerate(self.tasks):
            if self._is_done(task):
                logger.info("%s: done already", task.name)
            else:
                self._run_task(task, more=i + 1 < len(self.tasks))
            if task.kind == "validate":
                self._show_validation()

    def _check_before_data(self, todo: list[Task]) -> None:
        if any(task.kind != "export" for task in todo):
            check_domain_files(self.config.validation)
        if todo and "train" not in self.stages and self._newest() is None:
            raise UserError(self.store.root, "holds no checkpoint", fix="Run `python launcher.py stage=train` first.")

    def _check_with_data(self, todo: list[Task]) -> None:
        config = self.config
        manifest = load_manifest(config.data_dir)
        sizes = source_sizes(config, manifest)
        if any(task.kind != "export" for task in todo):
            check_heldout(config.validation, manifest)
        if any(task.kind == "export" for task in todo) and "gguf" in config.export.formats:
            folder = config.run.dir / "tokenizer"
            require_expressible(Tokenizer.load(folder), folder)
        if "train" not in self.stages:
            return
        phases = plan_phases(config.curriculum)
        check_enough_tokens(config, phases, sizes)
        if (newest := self._newest()) is not None:
            # The worker does this again and keeps what was allowed; here it comes before its imports, and for finished runs.
            newest.read_ledger().require_matches(
                expected_run(config, manifest, phases), config.checkpoint.allow_mismatch, where=newest.path
            )

    def _write_records(self) -> None:
        if self._recorded:
            return
        self._recorded = True
        run_dir = self.config.run.dir
        with disk_errors(run_dir, "writing the run's records"):
            write_text_atomic(run_dir / "config.yaml", to_yaml(self.config))
            write_environment(run_dir / "environment.json")

    def _run_task(self, task: Task, more: bool) -> None:
        code = self.workers.run(task, more)
        if code not in (0, 2) and self.signals.received is None:
            logger.warning("%s %s; trying once more from the last good checkpoint", task.name, _ending(code))
            code = self.workers.run(task, more)
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
        if task.kind == "train" and not self._is_done(task):
            raise Stopped(f"{task.name}: the state is saved.", None)

    def _is_done(self, task: Task) -> bool:
        newest = self._newest()
        if newest is None:
            return False
        if task.kind == "train":
            stopped = early_stop_tokens(self.config)
            return self._is_trained(task.phase, newest) or (stopped is not None and newest.tokens >= stopped)
        if task.kind == "validate":
            return find_result(self.config, newest) is not None
        return is_exported(self.config, newest)

    def _is_trained(self, number: int, newest: Checkpoint) -> bool:
        """Whether a phase is trained and validated. Having begun phase n + 1 means that n was ended."""
        if newest.phase < number or (newest.phase == number and not newest.phase_end):
            return False
        if phase_result_path(self.config.run.dir, number).is_file():
            return True
        return not any(c.phase == number and c.phase_end for c in self.store.list())

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, looked for anew when there are other ones than before."""
        digests = [checkpoint.manifest.digest for checkpoint in self.store.list()]
        if digests != self._newest_of[0]:
            self._newest_of = (digests, self.store.newest_good())
        return self._newest_of[1]

    def _show_validation(self) -> None:
        newest = self._newest()
        result: dict[str, Any] | None = find_result(self.config, newest) if newest else None
        if result is not None:
            logger.info("validation after %s tokens:\n%s", f"{result['tokens_total']:,}", table(result))


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
