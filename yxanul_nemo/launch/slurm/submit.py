"""`cluster=slurm`: the stages of a run as jobs, each of which starts when the one before has succeeded."""

import contextlib
import shlex
import sys
import time
from pathlib import Path

from rich.syntax import Syntax

from data_prep.prepare import run_data_stage
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import batch_layout, plan_phases
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.fetch.stage import fetch_for_checks, fetch_sources
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.launch.run_state import RunState
from yxanul_nemo.launch.slurm import commands
from yxanul_nemo.launch.slurm.record import ChainRecord, Job
from yxanul_nemo.launch.slurm.script import log_path, render, script_path
from yxanul_nemo.launch.tasks import Task
from yxanul_nemo.lock import RunLock
from yxanul_nemo.log import configure_logging, logger, table_console
from yxanul_nemo.machine.gpus import world_size
from yxanul_nemo.model.memory import with_micro_batch


def submit_chain(config: RunConfig, stages: list[str]) -> None:
    """Write the scripts of what is not done, and submit them unless `cluster.dry_run`.

    Raises:
        UserError: what a job would refuse later, a chain that is still in the queue, or Slurm's own refusal.
    """
    configure_logging()
    check_cluster(config)
    with RunLock(config.run.dir):
        if not config.cluster.dry_run:
            refuse_live_chain(config)
        state = RunState(config, stages)
        links = missing_links(state)
        if not links:
            logger.info("nothing to submit: all of it is done in %s", config.run.dir)
            return
        write_scripts(config, links)
        if config.cluster.dry_run:
            show(config, links)
            return
        first = submit_held(config, links)
    # Only now: the first job wants the lock that was held until here.
    commands.release(first)
    logger.info("stage=status shows the chain, stage=cancel ends it")


def check_cluster(config: RunConfig) -> None:
    """Refuse what cannot work on the nodes that are asked for, phase by phase."""
    cluster, parallel = config.cluster, config.parallel
    phases = plan_phases(config.curriculum)
    valid = {"data", "validate", "export", *(Task("train", phase.number).name for phase in phases)}
    for job in cluster.times:
        if job not in valid:
            raise UserError(
                f"cluster.times.{job}", f"there are {len(phases)} phases", f"phase-01 to phase-{len(phases):02d}"
            )
    ranks, model_ranks = world_size(config), parallel.tensor_parallel * parallel.context_parallel
    if ranks % model_ranks:
        raise UserError(
            "cluster.nodes",
            f"{cluster.nodes} nodes make {ranks} processes, with parallel.tensor_parallel={parallel.tensor_parallel} and "
            f"parallel.context_parallel={parallel.context_parallel}",
            f"a number of processes that {model_ranks} divides",
        )
    # Where the ranks' memory decides the micro-batch, any one tells whether a step can be shared.
    most_tokens = with_micro_batch(config, vocab_size=1, memory_bytes=None).parallel.fixed_micro_batch_tokens
    for phase in phases:
        batch_layout(phase, ranks // model_ranks, most_tokens, config.precision.token_multiple)
    image = cluster.container.image
    if image is not None and image.startswith(("/", "./", "../")) and not Path(image).is_file():
        raise UserError("cluster.container.image", f"{image} does not exist", "a .sqsh file, or an image of a registry")


def refuse_live_chain(config: RunConfig) -> None:
    """One chain at a time in a run's folder: two would train the same phases."""
    chain = ChainRecord.read(config.run.dir)
    states = commands.states_of(chain.ids) if chain else {}
    live = [job for job, state in states.items() if state.is_live]
    if live:
        raise UserError(
            config.run.dir,
            f"has jobs in the queue already: {', '.join(map(str, live))}",
            "one chain at a time in a run's folder",
            "See them with stage=status, end them with stage=cancel, or choose another run.dir.",
        )


def missing_links(state: RunState) -> list[tuple[Task, Task | None]]:
    """The tasks to submit, each with the one that must be done before it.

    What can be checked here is checked here; a corpus that is prepared already is compared with the configuration as
    `stage=data` does.
    """
    state.store.clean_temporaries()
    todo = state.todo()
    if "fetch" in state.stages and not state.config.cluster.dry_run:
        # Here and not in a job: compute nodes often have no way to the hub.
        fetch_for_checks(state.config)
        fetch_sources(state.config)
    state.check_before_data(todo)
    data = Task("data")
    if "data" in state.stages and state.has_data:
        run_data_stage(state.config)
    if state.has_data and ("train" in state.stages or todo):
        state.check_with_data(todo)
    tasks = [data, *state.tasks] if "data" in state.stages else state.tasks
    missing = [data, *todo] if "data" in state.stages and not state.has_data else todo
    before = dict(zip(tasks[1:], tasks, strict=False))
    first = next((task for task in missing if task.kind == "train"), None)
    if first is not None and first.phase > 1:
        # Of a part of the curriculum (phases=3-5); otherwise it is the phase before in this chain.
        earlier = Task("train", first.phase - 1)
        if before.get(first) != earlier and not state.is_done(earlier):
            raise UserError(
                f"phases={state.config.phases}",
                f"{earlier.name} is not done",
                f"the phases before {first.phase} to be trained",
                f"Submit without phases=, or with phases=1-{len(state.config.curriculum.phases)}.",
            )
        before[first] = earlier
    return [(task, before.get(task)) for task in missing]


def write_scripts(config: RunConfig, links: list[tuple[Task, Task | None]]) -> None:
    """`slurm/config.yaml`, which the jobs read, and a script for each; those of an earlier chain go."""
    folder = config.run.folder.slurm
    with disk_errors(folder, "writing job scripts"):
        for old in folder.glob("*.sh"):
            old.unlink()
        write_text_atomic(config.run.folder.slurm_config, to_yaml(config))
        for task, after in links:
            write_text_atomic(script_path(config, task), render(config, task, after))


def show(config: RunConfig, links: list[tuple[Task, Task | None]]) -> None:
    """Print the scripts and the commands that would submit them, on standard output."""
    console = table_console()
    submitted: set[Task] = set()
    for task, after in links:
        path = script_path(config, task)
        console.print(f"\n==> {path}", soft_wrap=True, markup=False)
        text = path.read_text(encoding="utf-8").rstrip()
        if sys.stdout.isatty():
            console.print(Syntax(text, "bash", background_color="default", word_wrap=True))
        else:
            console.print(text, soft_wrap=True, markup=False)
        condition = f"--dependency=afterok:<job of {after.name}> " if after in submitted else ""
        console.print(f"==> sbatch {condition}{shlex.quote(str(path))}", soft_wrap=True, markup=False)
        submitted.add(task)
    console.print(f"\n{len(links)} jobs; nothing was submitted (cluster.dry_run)", soft_wrap=True)


def submit_held(config: RunConfig, links: list[tuple[Task, Task | None]]) -> int:
    """Submit the chain, the first job held; its number. What was submitted is withdrawn if Slurm refuses a later one."""
    command = shlex.join(["python", *sys.argv])
    jobs: list[Job] = []
    submitted = time.strftime("%Y-%m-%d %H:%M:%S")
    for task, _ in links:
        after = jobs[-1].job_id if jobs else None
        try:
            number = commands.submit(script_path(config, task), after, hold=not jobs)
        except UserError:
            with contextlib.suppress(UserError):
                commands.cancel([job.job_id for job in jobs])
            raise
        jobs.append(Job(task.name, number, after))
        ChainRecord(command, submitted, jobs).write(config.run.dir)
        waits = "" if after is None else f" after {after}"
        logger.info("job %d: %s%s, log %s", number, task.name, waits, log_path(config.run.dir, task, number))
    return jobs[0].job_id
