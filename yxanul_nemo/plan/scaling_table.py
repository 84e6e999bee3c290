"""The tables of `plan.scale_to`: the whole run on ever more GPUs, and each phase on the most."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from yxanul_nemo.plan.scaling import PhaseAtScale, RunAtScale


def print_scaling(runs: list[RunAtScale], console: Console) -> None:
    """Both tables; nothing for an empty list."""
    if not runs:
        return
    console.print("on paper, from measured compute of one GPU and the stated speeds of links:", soft_wrap=True)
    console.print(_runs(runs))
    most = runs[-1]
    console.print(f"each phase on {most.gpus:,} GPUs, {most.nodes:,} nodes:", soft_wrap=True)
    console.print(_phases(most))
    for line in _conclusions(most):
        console.print(line, soft_wrap=True)


def _runs(runs: list[RunAtScale]) -> Table:
    headers = (
        "GPUs",
        "nodes",
        "tokens/s",
        "time",
        "GPU-hours",
        "communication",
        "efficiency",
        "with full\nmicro-batches",
    )
    table = _table(headers)
    for run in runs:
        table.add_row(
            f"{run.gpus:,}",
            f"{run.nodes:,}",
            f"{run.tokens_per_second:,.0f}",
            _duration(run.total_seconds),
            f"{run.gpu_hours:,.1f}",
            f"{run.communication_share:.1%}",
            f"{run.efficiency:.1%}",
            f"{run.full_efficiency:.1%}",
        )
    return table


def _phases(run: RunAtScale) -> Table:
    headers = (
        "",
        "seq\nlen",
        "tokens/step\nrecipe > forced",
        "per\nrank",
        "step\nms",
        "commu-\nnication",
        "effi-\nciency",
    )
    table = _table((*headers, "full micro-batches:\ntokens/step", "commu-\nnication", "effi-\nciency"))
    for phase in run.phases:
        table.add_row(
            str(phase.number),
            str(phase.seq_len),
            _forced(phase),
            f"{phase.tokens_per_rank:,}",
            f"{phase.step_seconds * 1e3:,.1f}",
            f"{phase.communication_share:.1%}",
            f"{phase.efficiency:.1%}",
            f"{phase.full_tokens_per_step:,}",
            f"{phase.full_communication_share:.1%}",
            f"{phase.full_efficiency:.1%}",
        )
    return table


def _conclusions(run: RunAtScale) -> list[str]:
    lines = []
    forced = [phase for phase in run.phases if phase.forced_tokens_per_step > phase.tokens_per_step]
    if forced:
        keys = " ".join(f"curriculum.phases.{p.number - 1}.tokens_per_step={p.forced_tokens_per_step}" for p in forced)
        lines.append(
            f"{run.gpus:,} GPUs cannot share the recipe's steps in phase {_numbers(forced)}; they force: {keys}"
        )
    longest = max(run.phases, key=lambda phase: phase.seq_len)
    lines.append(
        f"at seq_len {longest.seq_len}: {longest.efficiency:.1%} with {longest.forced_tokens_per_step:,} tokens per step, "
        f"{longest.full_efficiency:.1%} with {longest.full_tokens_per_step:,}"
    )
    return lines


def _forced(phase: PhaseAtScale) -> str:
    if phase.forced_tokens_per_step == phase.tokens_per_step:
        return f"{phase.tokens_per_step:,}"
    return f"{phase.tokens_per_step:,} > {phase.forced_tokens_per_step:,}"


def _numbers(phases: list[PhaseAtScale]) -> str:
    return ", ".join(str(phase.number) for phase in phases)


def _table(headers: tuple[str, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
