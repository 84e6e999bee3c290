"""`stage=plan`: the plan as one table on standard output and as `run.dir/plan.json`, the only file that it writes."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.figures import GIB, count, duration, rate, size
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.hub import free_bytes
from yxanul_nemo.log import table_console
from yxanul_nemo.machine.gpus import found_gpus
from yxanul_nemo.model.memory import COMFORTABLE_SHARE, WORKING_BYTES_PER_PARAMETER
from yxanul_nemo.plan.plan import Plan, make_plan
from yxanul_nemo.plan.preflight import needs_of, needs_table

MAX_WIDTH = 1000


def run_plan_stage(config: RunConfig) -> Plan:
    """Say what the run needs and has, make the plan, write it and print it.

    Raises what `make_plan` does, and UserError if the folder cannot be written."""
    needs = needs_of(config)
    console = table_console()
    console.print(needs_table(needs))
    for line in config.budget.because:
        console.print(line, soft_wrap=True, markup=False)
    plan = make_plan(config, found_gpus())
    notes = disk_warnings(plan, free_bytes(config.run.dir))
    plan = replace(plan, warnings=plan.warnings + notes, needs=needs)
    path = config.run.folder.plan
    with disk_errors(config.run.dir, f"writing {path.name}"):
        write_json_atomic(path, plan.to_json())
    print_plan(plan, path, console)
    return plan


def disk_warnings(plan: Plan, free_bytes: int) -> list[str]:
    """What to say where tokens and checkpoints to come do not fit into the free space; those of a finished phase are there already."""
    done = sum(phase.done is not None and phase.done.saved_tokens == phase.tokens for phase in plan.phases)
    to_come_bytes = plan.checkpoints_disk_bytes - done * plan.checkpoint_bytes + plan.tokens_disk_bytes
    if to_come_bytes <= free_bytes:
        return []
    there = f"the disk of {plan.run_dir} has {size(free_bytes)} free"
    what = "checkpoints and tokens" if plan.tokens_disk_bytes else "checkpoints"
    return [f"{what} take {size(to_come_bytes)} more, but {there}; free some, or choose another run.dir"]


def print_plan(plan: Plan, path: Path, console: Console) -> None:
    """The table and, below it, totals, sources of the figures and warnings."""
    console.print(
        f"[bold]{plan.recipe}[/bold]: {plan.model}, {plan.parameters:,} parameters, {plan.precision}, "
        f"{plan.gpus} x {plan.gpu} ({plan.gpu_chosen})",
        soft_wrap=True,
    )
    for table in phase_tables(plan, console):
        console.print(table)
    for line in summary_lines(plan):
        console.print(line, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]note:[/yellow] {warning}", soft_wrap=True)
    console.print(f"written: {path}", soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Column:
    """One column of the table of phases."""

    header: str
    cells: list[str]
    """One for each phase."""
    footer: str = ""
    """Its total."""
    style: str = ""


def phase_tables(plan: Plan, console: Console) -> list[Table]:
    """One row for each phase and the totals: in one table where the console is wide enough, else in two."""
    number = Column("", [str(phase.number) for phase in plan.phases])
    trained, taken = _columns_of_training(plan), _columns_of_cost(plan)
    whole = _table([number, *trained, *taken])
    unbounded = console.options.update(max_width=MAX_WIDTH)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        return [whole]
    return [_table([number, *trained]), _table([number, *taken])]


def _table(columns: list[Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    for column in columns:
        table.add_column(column.header, column.footer, justify="right", overflow="fold", style=column.style)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


def _columns_of_training(plan: Plan) -> list[Column]:
    phases = plan.phases
    columns = [
        Column("seq\nlen", [str(p.seq_len) for p in phases]),
        Column("text\nchars", [f"{p.text_chars:,.0f}" for p in phases]),
        Column("tokens", [count(p.tokens) for p in phases], count(plan.total_tokens)),
        Column("steps", [f"{p.steps:,}" for p in phases], f"{plan.total_steps:,}"),
        Column("tokens/\nstep", [f"{p.tokens_per_step:,}" for p in phases]),
        Column(
            "windows x\naccum x ranks",
            [f"{p.micro_batch_size:,} x {p.accumulation} x {p.data_parallel}" for p in phases],
        ),
    ]
    names = list(phases[0].blend or {})
    if len(names) != 1:
        shares = ["/".join(f"{100 * s:.3g}" for s in p.blend.values()) if p.blend else "by size" for p in phases]
        columns.append(Column("blend %\n" + "/".join(names), shares))
    return columns


def _columns_of_cost(plan: Plan) -> list[Column]:
    phases = plan.phases
    rates = [(p.learning_rate_first, p.learning_rate_peak, p.learning_rate_last) for p in phases]
    speeds = [
        ("" if p.tokens_per_second_basis == "measured" else "~") + count(p.tokens_per_second, digits=3) for p in phases
    ]
    columns = [
        Column("learning rate\nfirst > peak > last", [" > ".join(map(rate, triple)) for triple in rates]),
        Column("clip", [f"{p.grad_clip:g}" for p in phases]),
        Column("tokens/s\n(~: est.)", speeds),
        Column("time", [duration(p.seconds) for p in phases], duration(plan.total_seconds)),
    ]
    if plan.gpu_memory_bytes is not None:
        columns.append(Column("memory\nGiB", [_memory(p.memory_bytes, plan.gpu_memory_bytes) for p in phases]))
    if any(p.done for p in phases):
        done = [p.done for p in phases]
        trained = sum(d.tokens for d in done if d)
        seconds = sum(d.training_seconds or 0.0 for d in done if d)
        shares = [f"{d.tokens / p.tokens:.0%}" if d else "" for p, d in zip(phases, done, strict=True)]
        real = [count(d.tokens_per_second_median, 3) if d and d.tokens_per_second_median else "" for d in done]
        times = [duration(d.training_seconds) if d and d.training_seconds else "" for d in done]
        columns += [
            Column("done", shares, f"{trained / plan.total_tokens:.0%}", "cyan"),
            Column("real\ntokens/s", real, "", "cyan"),
            Column("real\ntime", times, duration(seconds), "cyan"),
        ]
    return columns


def summary_lines(plan: Plan) -> list[str]:
    """Totals and where the figures are from."""
    cost = (
        f", cost {plan.total_cost:,.2f} at {plan.price_per_gpu_hour:g} per GPU-hour"
        if plan.total_cost is not None
        else ""
    )
    hours = f", {plan.total_gpu_hours:,.2f} GPU-hours" if plan.gpu_memory_bytes is not None else ""
    lines = [
        f"total: {plan.total_tokens:,} tokens in {plan.total_steps:,} steps, {plan.total_flops:.3g} FLOPs, "
        f"about {duration(plan.total_seconds)} of training steps{hours}{cost}",
        f"checkpoints: {size(plan.checkpoint_bytes)} each, at most {plan.checkpoints_kept} at a time: "
        f"{size(plan.checkpoints_disk_bytes)} of disk"
        + (f"; tokens: about {size(plan.tokens_disk_bytes)}" if plan.tokens_disk_bytes else ""),
    ]
    if plan.sources is None:
        lines.append("epochs: known when stage=data has prepared the corpus")
    else:
        epochs = ", ".join(
            f"{name} {source.epochs:.2f} (of {count(source.train_tokens)} tokens)"
            for name, source in plan.sources.items()
        )
        lines.append(f"epochs: {epochs}")
    lines.append(f"text: {plan.chars_per_token_source}")
    speeds: dict[str, list[int]] = {}
    for phase in plan.phases:
        speeds.setdefault(phase.tokens_per_second_source, []).append(phase.number)
    lines += [f"tokens/s, phase {_numbers(numbers)}: {source}" for source, numbers in speeds.items()]
    if plan.gpu_memory_bytes is not None:
        per_parameter = WORKING_BYTES_PER_PARAMETER + plan.checkpoint_bytes / plan.parameters
        lines.append(
            f"memory: estimate for one GPU, of {plan.gpu_memory_bytes / GIB:.1f} GiB; {per_parameter:.3g} bytes per parameter and, per "
            "token of a micro-batch, what was measured on one H100"
        )
    return lines


def _memory(memory_bytes: float | None, of_bytes: int) -> str:
    if memory_bytes is None:
        return ""
    text = f"{memory_bytes / GIB:.1f}"
    return f"[red]{text}[/red]" if memory_bytes > COMFORTABLE_SHARE * of_bytes else text


def _numbers(numbers: list[int]) -> str:
    """`1-3, 5` for 1, 2, 3, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
