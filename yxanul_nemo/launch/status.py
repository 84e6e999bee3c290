"""`stage=status`: what of a run is done, at work and waiting, with speed and time left; of a chain of jobs and of a local run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from data_prep.corpus.manifest import MANIFEST_NAME, load_manifest
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import Phase, plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.own_settings import own_settings
from yxanul_nemo.launch.run_state import RunState
from yxanul_nemo.launch.slurm import commands
from yxanul_nemo.launch.slurm.commands import JobState
from yxanul_nemo.launch.slurm.record import ChainRecord, Job, JobNote
from yxanul_nemo.launch.slurm.script import log_path
from yxanul_nemo.launch.tasks import STAGES, Task
from yxanul_nemo.lock import Owner, running_launcher
from yxanul_nemo.log import logger, table_console
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.plan.progress import PhaseDone, phases_done
from yxanul_nemo.validation.record import last_mean

WORDS = {"PENDING": "queued", "COMPLETING": "ending", "TIMEOUT": "over its limit", "COMPLETED": "ended"}


@dataclass(frozen=True)
class Row:
    """One task of a run."""

    task: str
    seq_len: int | None
    state: str
    """done, running, waiting, queued (reason), failed, cancelled, stopped, not begun, ..."""
    job_id: int | None
    tokens: int
    planned_tokens: int | None
    tokens_per_second: float | None
    """Measured; None where nothing was trained yet."""
    seconds_left: float | None
    """Of training steps; None where no speed is known."""
    is_estimate: bool
    """Whether the time left is from the speed of another phase, by FLOPs per token."""
    message: str = ""
    """Why it failed or stopped."""


def show_status(config: RunConfig) -> None:
    """Print the table on standard output; reads, and changes nothing."""
    chain = ChainRecord.read(config.run.dir)
    _require_run(config)
    rows = status_rows(config)
    console = table_console()
    head = f"[bold]{config.run.name}[/bold] in {config.run.dir}"
    console.print(f"{head}, submitted {chain.submitted}" if chain else head, soft_wrap=True)
    console.print(_table(rows))
    for row in rows:
        if row.message and row.state not in ("done", "running"):
            log = f"; log {log_path(config.run.dir, Task.named(row.task), row.job_id)}" if row.job_id else ""
            console.print(f"{row.task}: {row.message}{log}", soft_wrap=True, markup=False)
    broken = [row for row in rows if row.state not in ("done", "running", "waiting", "ending", "not begun")]
    if chain and broken and not any(row.state.startswith(("running", "queued", "waiting", "ending")) for row in rows):
        console.print(f"to go on: {chain.command}", soft_wrap=True, markup=False)


def show_runs(folders: Sequence[Path]) -> None:
    """Print a line for each of several runs on standard output."""
    if not folders:
        raise UserError("runs", "names no run", "folders of runs, as in 'runs=[runs/*]'")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("run", "state", "tokens", "done", "bits/byte", "from"):
        table.add_column(name, justify="right" if name in ("tokens", "done", "bits/byte") else "left", overflow="fold")
    for folder in folders:
        table.add_row(*_run_cells(folder))
    table_console().print(table)


def _run_cells(folder: Path) -> list[str]:
    own = own_settings(folder)
    if own is None:
        raise UserError("runs", f"names {folder}, which holds no run", "folders of runs that have begun")
    try:
        rows = status_rows(own)
    except UserError as error:
        return [str(folder), f"cannot be read: {error}", "", "", "", ""]
    trained, planned = sum(row.tokens for row in rows), sum(row.planned_tokens or 0 for row in rows)
    at = next((row for row in rows if row.state != "done"), None)
    newest = CheckpointStore.of_run(own, verify="size").newest_good()
    ledger = newest.read_ledger() if newest else None
    parent = ledger.lineage[-1] if ledger and ledger.lineage else None
    score = last_mean(own)
    return [
        str(folder),
        f"{at.task} {at.state}" if at else "done",
        f"{trained:,} of {planned:,}",
        f"{trained / planned:.0%}",
        f"{score:.4f}" if score is not None else "",
        f"{parent.run} at {parent.at_tokens:,}" if parent else "",
    ]


def _require_run(config: RunConfig) -> None:
    folder = config.run.folder
    marks = (folder.config, folder.slurm_config, folder.data / MANIFEST_NAME)
    if folder.checkpoints.is_dir() or any(path.is_file() for path in marks) or running_launcher(folder.root):
        return
    raise UserError(
        folder.root, "holds no run", "the folder of a run", "Name it with run.dir=, or begin it with stage=all."
    )


def status_rows(config: RunConfig) -> list[Row]:
    """Every task of the recipe, in order.

    Raises:
        UserError: every checkpoint of the run is damaged.
    """
    quick = config.checkpoint.model_copy(update={"verify": "size"})
    state = RunState(config.model_copy(update={"checkpoint": quick, "phases": None}), list(STAGES))
    chain = ChainRecord.read(config.run.dir)
    jobs = {job.task: job for job in chain.jobs} if chain else {}
    known = _known(chain)
    newest, owner = state.newest(), running_launcher(config.run.dir)
    phases = plan_phases(config.curriculum)
    done = phases_done(config.run.folder.metrics, newest.read_ledger() if newest else None, phases)
    speeds = _Speeds(config, phases, done)
    rows: list[Row] = []
    for task in (Task("data"), *state.tasks):
        begun = (bool(rows) and rows[-1].state == "done") or not rows
        word, message = _state(config, state, task, jobs.get(task.name), known, owner if begun else None)
        phase = phases[task.phase - 1] if task.kind == "train" else None
        made = done.get(task.phase) if phase else None
        tokens = phase.tokens if phase and word == "done" else made.tokens if made else 0
        speed, is_estimate = speeds.of(phase) if phase else (None, False)
        rows.append(
            Row(
                task=task.name,
                seq_len=phase.seq_len if phase else None,
                state=word,
                job_id=jobs[task.name].job_id if task.name in jobs else None,
                tokens=tokens,
                planned_tokens=phase.tokens if phase else None,
                tokens_per_second=made.tokens_per_second_median if made else None,
                seconds_left=(phase.tokens - tokens) / speed if phase and speed else None,
                is_estimate=is_estimate,
                message=message,
            )
        )
    return rows


def _known(chain: ChainRecord | None) -> dict[int, JobState]:
    """What Slurm says of the jobs; nothing where it cannot be asked, as on a machine outside the cluster."""
    if chain is None:
        return {}
    try:
        return commands.states_of(chain.ids)
    except UserError as error:
        logger.warning("the queue is not shown: %s", error)
        return {}


def _state(
    config: RunConfig, state: RunState, task: Task, job: Job | None, known: dict[int, JobState], owner: Owner | None
) -> tuple[str, str]:
    """(state, message) of a task; `owner` is the launcher at work here if it is this task's turn."""
    note = JobNote.read(config.run.dir, task.name)
    message = note.message if note and job and note.job_id == job.job_id else ""
    slurm = known.get(job.job_id) if job else None
    if slurm is not None and slurm.is_live:
        return _live(slurm), message
    if state.is_done(task):
        return "done", ""
    if owner is not None:
        return "running", ""
    if job is not None:
        if note is not None and note.job_id == job.job_id and note.state in ("failed", "stopped"):
            cancelled = slurm is not None and slurm.state == "CANCELLED"
            return ("cancelled" if cancelled else note.state), message
        return (
            WORDS.get(slurm.state, slurm.state.lower().replace("_", " ")) if slurm else "no longer in the queue"
        ), ""
    newest = state.newest()
    half_way = task.kind == "train" and newest is not None and newest.phase == task.phase
    return ("stopped" if half_way else "not begun"), ""


def _live(slurm: JobState) -> str:
    if slurm.state == "PENDING":
        if slurm.reason == "Dependency":
            return "waiting"
        return "queued" if slurm.reason == "None" else f"queued ({slurm.reason})"
    return WORDS.get(slurm.state, slurm.state.lower())


class _Speeds:
    """Tokens per second of each phase: its own, or that of the latest phase that has one, scaled by FLOPs per token."""

    def __init__(self, config: RunConfig, phases: list[Phase], done: dict[int, PhaseDone]):
        self.config, self.done = config, done
        speeds = {number: phase_done.tokens_per_second_median for number, phase_done in done.items()}
        measured = [(phase, speed) for phase in phases if (speed := speeds.get(phase.number))]
        self.latest = measured[-1] if measured else None
        self.vocab_size = load_manifest(config.data_dir).vocab_size if self.latest else 0

    def of(self, phase: Phase) -> tuple[float | None, bool]:
        """(tokens per second, whether it is an estimate)."""
        if phase.number in self.done and (own := self.done[phase.number].tokens_per_second_median):
            return own, False
        if self.latest is None:
            return None, True
        latest, speed = self.latest
        return speed * self._flops(latest) / self._flops(phase), True

    def _flops(self, phase: Phase) -> float:
        return training_flops_per_token(self.config.model, self.vocab_size, phase.seq_len)


def _table(rows: list[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    trained, planned = sum(row.tokens for row in rows), sum(row.planned_tokens or 0 for row in rows)
    left = [row.seconds_left for row in rows if row.planned_tokens]
    known = [seconds for seconds in left if seconds is not None]
    rough = "~" if any(row.is_estimate and row.seconds_left for row in rows) else ""
    table.add_column("task", "all", justify="left")
    table.add_column("seq len", justify="right")
    table.add_column("state", justify="left")
    table.add_column("job", justify="right")
    table.add_column("tokens", f"{trained:,} of {planned:,}", justify="right")
    table.add_column("done", f"{trained / planned:.0%}", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("time left", f"{rough}{_duration(sum(known))}" if len(known) == len(left) else "", justify="right")
    for row in rows:
        of = f"{row.tokens:,} of {row.planned_tokens:,}" if row.planned_tokens else ""
        share = f"{row.tokens / row.planned_tokens:.0%}" if row.planned_tokens else ""
        remaining = f"{'~' if row.is_estimate else ''}{_duration(row.seconds_left)}" if row.seconds_left else ""
        speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else ""
        job = str(row.job_id) if row.job_id else ""
        seq_len = str(row.seq_len) if row.seq_len else ""
        table.add_row(row.task, seq_len, row.state, job, of, share, speed, remaining)
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
