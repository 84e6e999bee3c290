"""The stages of the pipeline in order, each doing only what is not done yet. Light: heavy work happens in worker processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_prep.manifest import load_manifest
from data_prep.prepare import run_data_stage
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.export.record import is_exported
from yxanul_nemo.files import write_json_atomic, write_text_atomic
from yxanul_nemo.launch.environment import describe_environment
from yxanul_nemo.launch.lock import RunLock
from yxanul_nemo.launch.processes import Task, Worker
from yxanul_nemo.log import configure_logging, logger
from yxanul_nemo.training.phases import check_enough_tokens, plan_phases, selected_phases
from yxanul_nemo.validation.record import find_result, phase_result_path
from yxanul_nemo.validation.table import table

STAGES = ("data", "train", "validate", "export")


class StageFailed(Exception):
    """A worker failed; it has said why. `exit_code` is what the launcher ends with."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""


def selected_stages(stage: str | list[str]) -> list[str]:
    """The stages meant by `stage=...`, in pipeline order."""
    asked = [stage] if isinstance(stage, str) else list(stage)
    for name in asked:
        if name not in (*STAGES, "all"):
            raise UserError("stage", f"no stage '{name}'", f"all, {', '.join(STAGES)}", nearest(name, [*STAGES, "all"]))
    return [name for name in STAGES if name in asked or "all" in asked]


def run_stages(config: RunConfig) -> None:
    """Run the configured stages.

    Raises:
        UserError: the user's mistake.
        StageFailed: a worker failed.
        Stopped: stopped on request; the state is saved.
    """
    stages = selected_stages(config.stage)
    selected_phases(config.phases, len(config.curriculum.phases))
    with RunLock(config.run.dir) as lock:
        configure_logging(config.run.dir / "logs" / "launcher.log")
        write_text_atomic(config.run.dir / "config.yaml", to_yaml(config))
        write_json_atomic(config.run.dir / "environment.json", describe_environment())
        store = CheckpointStore(config.run.dir / "checkpoints", config.checkpoint.keep_latest, config.checkpoint.verify)
        with Chain(config, stages, store, lock.fd).open() as chain:
            if "data" in stages:
                run_data_stage(config)
            chain.run()
    logger.info("done: %s", config.run.dir)


class Chain:
    """The worker tasks of the chosen stages. While one runs, the next one's process is already importing."""

    def __init__(self, config: RunConfig, stages: list[str], store: CheckpointStore, lock_fd: int):
        self.config, self.store, self.lock_fd = config, store, lock_fd
        self.trains = "train" in stages
        phases = selected_phases(config.phases, len(config.curriculum.phases)) if self.trains else []
        self.tasks = [Task("train", number) for number in phases]
        self.tasks += [Task(stage) for stage in ("validate", "export") if stage in stages]
        self.waiting: Worker | None = None

    @contextmanager
    def open(self) -> Iterator["Chain"]:
        """Start the first worker ahead; whatever happens, no waiting worker is left behind."""
        self._start_ahead([task for task in self.tasks if not self._is_done(task)])
        try:
            yield self
        finally:
            if self.waiting is not None:
                self.waiting.cancel()

    def run(self) -> None:
        """Run the tasks that are not done."""
        if self.trains:
            self.store.clean_temporaries()
            manifest = load_manifest(self.config.data_dir)
            sizes = {name: manifest.sources[name].tokens("train") for name in self.config.data.source_names}
            check_enough_tokens(self.config, plan_phases(self.config.curriculum), sizes)
        for i, task in enumerate(self.tasks):
            if self._is_done(task):
                logger.info("%s: done already", task.name)
            else:
                self._run_task(task, self.tasks[i + 1 :])
            if task.kind == "validate":
                self._show_validation()

    def _run_task(self, task: Task, later: list[Task]) -> None:
        worker = self._take(task)
        self._start_ahead([t for t in later if t.kind != "validate"])
        code = worker.run()
        if code not in (0, 2):
            logger.warning("%s ended with code %d; trying once more from the last good checkpoint", task.name, code)
            worker = Worker(self.config, task, self.lock_fd)
            code = worker.run()
        if code == 2:
            raise StageFailed(f"{task.name} stopped, see above", exit_code=2)
        if code != 0:
            tail = "\n".join(worker.last_lines)
            raise StageFailed(
                f"{task.name} failed twice (exit code {code}). End of {worker.log_path}:\n{tail}", exit_code=1
            )
        if not self._is_done(task):
            raise Stopped(f"stopped in {task.name}; the state is saved. Repeat the command to go on.")

    def _take(self, task: Task) -> Worker:
        worker, self.waiting = self.waiting, None
        if worker is not None and worker.task == task:
            return worker
        if worker is not None:
            worker.cancel()
        return Worker(self.config, task, self.lock_fd)

    def _start_ahead(self, tasks: list[Task]) -> None:
        if tasks:
            self.waiting = Worker(self.config, tasks[0], self.lock_fd)

    def _is_done(self, task: Task) -> bool:
        if task.kind == "train":
            ended = self._phase_end(task.phase)
            return ended is not None and phase_result_path(self.config.run.dir, task.phase).is_file()
        newest = self._newest()
        if newest is None:
            return False
        if task.kind == "validate":
            return find_result(self.config, newest) is not None
        return is_exported(self.config, newest)

    def _phase_end(self, number: int) -> Checkpoint | None:
        """The end of a phase that later phases may have replaced: having begun phase n + 1 means that n was ended."""
        checkpoints = self.store.list()
        return next((c for c in checkpoints if c.phase > number or (c.phase == number and c.phase_end)), None)

    def _newest(self) -> Checkpoint | None:
        checkpoints = self.store.list()
        return checkpoints[-1] if checkpoints else None

    def _show_validation(self) -> None:
        newest = self._newest()
        result: dict[str, Any] | None = find_result(self.config, newest) if newest else None
        if result is not None:
            logger.info("validation after %s tokens:\n%s", f"{result['tokens_total']:,}", table(result))
