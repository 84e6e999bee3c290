"""`precision=auto`: which number format a phase is trained in. Where a GPU has a choice, its own speed at the phase's shape decides."""

import math
from collections.abc import Callable, Sequence

from yxanul_nemo.checkpoint.ledger import PhaseRecord
from yxanul_nemo.config.run import RunConfig, check_fp8_widths
from yxanul_nemo.config.training import NumberFormat
from yxanul_nemo.curriculum.phases import Phase, batch_layout
from yxanul_nemo.log import logger
from yxanul_nemo.machine.runtime import formats_of


def formats_for(
    config: RunConfig, phase: Phase, record: PhaseRecord | None, data_parallel: int, device: str
) -> tuple[NumberFormat, ...]:
    """The format that a phase is to be trained in, or those to choose from, FP8 first.

    Args:
        config: `parallel.micro_batch_tokens` is a number.
        record: the ledger's record of this phase if it was begun; its format is kept where the machine has it.
    """
    formats = formats_of(config.precision, config.parallel, device)
    if len(formats) == 1:
        return formats
    if record is not None and record.precision in formats:
        return (record.precision,)
    reason = _why_not_fp8(config, phase, formats[0], data_parallel)
    if reason is None:
        return formats
    logger.info("precision=auto: phase %d in %s, as %s", phase.number, formats[-1], reason)
    return formats[-1:]


def pick_faster_format(
    formats: Sequence[NumberFormat],
    micro_batch_tokens: int,
    seconds_per_micro_batch: Callable[[bool], float],
    slowest_of_ranks: Callable[[float], float],
    phase_number: int,
) -> NumberFormat:
    """The format, of FP8 and BF16 in this order, whose forward and backward of a micro-batch take less time; the same on all ranks.

    Args:
        seconds_per_micro_batch: by whether FP8 is left out (`CudaBackend.seconds_per_micro_batch`).
        slowest_of_ranks: the largest of all ranks' numbers.
    """
    seconds = [slowest_of_ranks(seconds_per_micro_batch(in_bf16)) for in_bf16 in (False, True)]
    chosen = formats[0] if seconds[0] < seconds[1] else formats[1]
    speeds = [
        f"{name} {micro_batch_tokens / taken:,.0f} tokens/s" if math.isfinite(taken) else f"{name} out of memory"
        for name, taken in zip(formats, seconds, strict=True)
    ]
    logger.info(
        "precision=auto: phase %d in %s (forward and backward of %s tokens: %s)",
        phase_number,
        chosen,
        f"{micro_batch_tokens:,}",
        ", ".join(speeds),
    )
    return chosen


def _why_not_fp8(config: RunConfig, phase: Phase, fp8: NumberFormat, data_parallel: int) -> str | None:
    precision = config.precision.named(fp8)
    try:
        check_fp8_widths(config.model, precision, config.parallel)
        batch_layout(phase, data_parallel, config.parallel.fixed_micro_batch_tokens, precision.token_multiple)
    except ValueError as error:
        return str(error)
    return None
