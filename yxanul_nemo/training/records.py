"""One record of training: what is measured since the last one, sent to every sink and shown as one line."""

import time
from collections.abc import Sequence

from lightning.pytorch.loggers.logger import Logger

from yxanul_nemo.log import logger
from yxanul_nemo.training.module import PhaseModule


def record_interval(sinks: Sequence[Logger], module: PhaseModule) -> None:
    """Close the meter's interval and say what happened in it."""
    record = module.meter.record() | {
        "phase": module.phase.number,
        "seq_len": module.phase.seq_len,
        "step_in_phase": module.steps_done,
        "learning_rate": module.last_lr,
        "grad_clip": module.phase.grad_clip,
        "time_unix": time.time(),
    }
    for sink in sinks:
        sink.log_metrics(record, step=module.tokens_total)
    logger.info("%s", record_line(module, record))


def record_line(module: PhaseModule, record: dict[str, float]) -> str:
    """The record for people."""
    done, planned = module.steps_done, module.phase.steps
    skipped = f" {record['skipped_steps']} skipped" if record["skipped_steps"] else ""
    return (
        f"phase {module.phase.number} seq {module.phase.seq_len:>4} step {done:>5}/{planned} "
        f"loss {record['loss_nats_per_token']:.4f} bpb {record['bits_per_byte']:.4f} lr {record['learning_rate']:.2e} "
        f"norm {record['grad_norm']:.2f} {record['tokens_per_second']:,.0f} tok/s {module.tokens_total:,} tokens{skipped}"
    )
