"""What a plan warns of, as assumptions behind its figures, and the memory that it refuses."""

import os
from collections.abc import Sequence
from typing import Protocol

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.figures import GIB
from yxanul_nemo.machine.gpu_table import Gpu, gpu_named
from yxanul_nemo.model.memory import (
    COMFORTABLE_SHARE,
    CPU_MICRO_BATCH_TOKENS,
    forecast_memory_bytes,
    largest_micro_batch_tokens,
)


class PlannedPhase(Protocol):
    """What is looked at of a phase (`plan.PhaseForecast`)."""

    @property
    def number(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def memory_bytes(self) -> float | None: ...


def plan_warnings(
    config: RunConfig,
    gpu: Gpu | None,
    found: list[str],
    ranks: int,
    rows: Sequence[PlannedPhase],
    vocab_size: int,
    vocab_size_source: str,
) -> list[str]:
    """Return one sentence for each.

    Raises:
        UserError: a phase's micro-batch is expected to take more than a GPU's whole memory, or the machine's on a CPU.
    """
    warnings = []
    if vocab_size_source == "assumed":
        warnings.append(f"the tokenizer's vocabulary is not known before stage=data; {vocab_size:,} ids are assumed")
    here = gpu_named(found[0]) if found else None
    if gpu is not None and here is not None and here != gpu:
        warnings.append(f"this machine has {here.name}: plan.gpu=auto plans for it")
    if ranks > 1 and gpu is None:
        warnings.append(f"speed on {ranks} ranks is taken as {ranks} times that of one: not measured")
    elif ranks > 1:
        warnings.append(
            f"speed on {ranks} GPUs is that of one and, for what they send, the stated speeds of links (plan.node_gb_per_second, "
            "plan.network_gb_per_second and their efficiency): within 4% of what two H100 measured, not measured beyond"
        )
    parallel = config.parallel
    if gpu is not None and (parallel.layer_spec == "torch" or not parallel.cuda_graph or not parallel.op_fuser):
        warnings.append(
            "speed and memory are those of parallel.layer_spec=te with op_fuser and cuda_graph: others are slower"
        )
    if config.data.document_mask:
        warnings.append(
            "data.document_mask: speed, memory and FLOPs are those of attention over whole windows; inside documents there is less of it"
        )
    if gpu is None:
        _check_memory_of_machine(config, rows, config.model.padded_vocab_size(vocab_size))
    else:
        warnings += _memory_warnings(config, gpu, rows, config.model.padded_vocab_size(vocab_size))
    return warnings


def _memory_warnings(config: RunConfig, gpu: Gpu, rows: Sequence[PlannedPhase], vocab_rows: int) -> list[str]:
    comfortable_bytes = COMFORTABLE_SHARE * gpu.memory_bytes
    worst = max(rows, key=lambda row: row.memory_bytes or 0.0)
    if worst.memory_bytes is None or worst.memory_bytes <= comfortable_bytes:
        return []
    fits = largest_micro_batch_tokens(
        config.model,
        vocab_rows,
        config.precision,
        config.parallel,
        comfortable_bytes,
        with_muon=config.optim.muon is not None,
    )
    window = max(row.seq_len for row in rows)
    remedy = (
        f"parallel.micro_batch_tokens={fits // window * window} fits"
        if fits >= window
        else f"not even one window of {window} tokens fits"
    )
    needed, there = worst.memory_bytes / GIB, gpu.memory_bytes / GIB
    if worst.memory_bytes > gpu.memory_bytes:
        expected = f"at most {COMFORTABLE_SHARE:.0%} of it"
        problem = f"is {config.parallel.micro_batch_tokens:,}, with which phase {worst.number} needs about {needed:.1f} of {there:.1f} GiB"
        raise UserError("parallel.micro_batch_tokens", f"{problem} of a GPU's memory", expected, f"{remedy}.")
    return [f"phase {worst.number} needs about {needed:.1f} of {there:.1f} GiB of a GPU's memory; {remedy}"]


def _check_memory_of_machine(config: RunConfig, rows: Sequence[PlannedPhase], vocab_rows: int) -> None:
    """Refuse a micro-batch on a CPU that is far over this machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = config.parallel.micro_batch_tokens
    assert most != "auto"
    step = max(phase.tokens_per_step for phase in config.curriculum.phases)
    needed = forecast_memory_bytes(
        config.model,
        vocab_rows,
        config.precision,
        config.parallel,
        min(most, step),
        with_muon=config.optim.muon is not None,
    )
    if needed > there:
        raise UserError(
            "parallel.micro_batch_tokens",
            f"is {most:,}, which takes about {needed / GIB:,.0f} GiB, and this machine has {there / GIB:.0f}",
            "what fits",
            f"Leave it at auto ({CPU_MICRO_BATCH_TOKENS:,} on a CPU); steps are then accumulated.",
        )
