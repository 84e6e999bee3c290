"""One record of training: what was measured since the last one, sent to every sink and shown as one line."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.curriculum.phases import Phase
from yxanul_nemo.figures import GIB, clock
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpu_table import gpu_named
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.training.prepare import PreparedPhase
from yxanul_nemo.training.skips import SkippedUpdate
from yxanul_nemo.training.state import TrainingState

NEWEST_WEIGHT = 0.3
"""Weight of the newest interval in the moving average of speed that the time left is computed with."""

Show = Callable[[str, Mapping[str, Any]], None]
"""Takes a record's line, and the record with what a display needs besides."""


def log_line(line: str, progress: Mapping[str, Any]) -> None:
    """Show a record as a line of the log."""
    logger.info("%s", line)


class Recorder:
    """Closes the meter's intervals and passes them on.

    Args:
        phases: the whole curriculum, for the time left.
        flops_per_token: of forward and backward, for each phase.
        device: `cuda` or `cpu`, of this process.
        peak_flops_per_second: of all devices of the run (`peak_flops_per_second()`); None where no such figure is known.
        show: what shows a record to people.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        flops_per_token: Sequence[float],
        device: str,
        peak_flops_per_second: float | None = None,
        show: Show = log_line,
    ):
        self.phases, self.flops_per_token, self.device = phases, flops_per_token, device
        self.peak_flops_per_second, self.show = peak_flops_per_second, show
        self._flops_per_second = 0.0

    def record(self, state: TrainingState) -> None:
        """Send what happened since the last record to the sinks, and show it.

        `mfu` is the model FLOP/s (`model.counts.training_flops_per_token`) over `mfu_peak_flops_per_second`; both are left out
        where no peak is known, as on a CPU. `peak_memory_bytes` is the largest amount that this process has held so far:
        of the GPU by torch's allocator, else of main memory.
        """
        record = state.meter.record() | {
            "phase": state.phase.number,
            "seq_len": state.phase.seq_len,
            "step_in_phase": state.steps_done,
            "learning_rate": state.last_lr,
            "grad_clip": state.phase.grad_clip,
            "peak_memory_bytes": _peak_memory_bytes(self.device),
            "time_unix": time.time(),
        }
        if self.peak_flops_per_second is not None:
            record["mfu"] = record["model_flops_per_second"] / self.peak_flops_per_second
            record["mfu_peak_flops_per_second"] = self.peak_flops_per_second
        for skip in state.meter.skipped_updates:
            self._record_skip(state, skip)
        for sink in state.loggers:
            sink.log_metrics(record, step=state.tokens_total)
        state.callback_metrics |= record
        progress = record | {"tokens_total": state.tokens_total} | self._seconds_left(state, record)
        if self.device == "cuda":
            progress["device_memory_bytes"] = torch.cuda.get_device_properties().total_memory
        self.show(record_line(state, progress, len(self.phases)), progress)

    def _record_skip(self, state: TrainingState, skip: SkippedUpdate) -> None:
        """A record of its own, whose step axis is that step's; all names in it begin with `skipped_`."""
        step = state.steps_done - skip.steps_ago
        values = {
            "skipped_phase": state.phase.number,
            "skipped_step_in_phase": step,
            "skipped_loss_nats_per_token": skip.loss,
            "skipped_grad_norm": skip.grad_norm,
        }
        for sink in state.loggers:
            sink.log_metrics(values, step=state.phase.first_token + step * state.phase.tokens_per_step)
        logger.warning(
            "phase %d step %d: update skipped, %s (loss %.4f, gradient norm %.4f)",
            state.phase.number,
            step,
            skip.reason,
            skip.loss,
            skip.grad_norm,
        )

    def _seconds_left(self, state: TrainingState, record: Mapping[str, float]) -> dict[str, float]:
        """Of training steps alone. Later phases are taken to reach the FLOP/s of this one."""
        before, now = self._flops_per_second, record["model_flops_per_second"]
        self._flops_per_second = NEWEST_WEIGHT * now + (1 - NEWEST_WEIGHT) * before if before else now
        phase_flops, run_flops = 0.0, 0.0
        for phase, per_token in zip(self.phases, self.flops_per_token, strict=True):
            left = min(phase.tokens, max(0, phase.first_token + phase.tokens - state.tokens_total)) * per_token
            run_flops += left
            phase_flops += left if phase.number == state.phase.number else 0.0
        return {
            "phase_seconds_left": phase_flops / self._flops_per_second,
            "run_seconds_left": run_flops / self._flops_per_second,
        }


def make_recorder(prepared: PreparedPhase, show: Show) -> Recorder:
    """Return the recorder of a phase that is to be trained on all ranks."""
    config, vocab_size = prepared.config, prepared.manifest.vocab_size
    flops = [training_flops_per_token(config.model, vocab_size, phase.seq_len) for phase in prepared.phases]
    peak = peak_flops_per_second(config.precision, prepared.device, dist.get_world_size())
    return Recorder(prepared.phases, flops, prepared.device, peak, show)


def peak_flops_per_second(precision: PrecisionConfig, device: str, devices: int) -> float | None:
    """Peak of dense matrices of `devices` GPUs like this process's: of BF16, also where the layers run in FP8; of FP32 in FP32.

    None on a CPU and on GPUs that are not in the table.
    """
    gpu = gpu_named(torch.cuda.get_device_name()) if device == "cuda" else None
    if gpu is None:
        return None
    return devices * (gpu.fp32_flops_per_second if precision.name == "fp32" else gpu.bf16_flops_per_second)


def record_line(state: TrainingState, record: Mapping[str, Any], phase_count: int) -> str:
    """A record for people; `record` holds the seconds left as well."""
    done, planned = state.steps_done, state.phase.steps
    mfu = f" mfu {record['mfu']:.1%}" if "mfu" in record else ""
    skipped = f" {record['skipped_steps']} skipped" if record["skipped_steps"] else ""
    return (
        f"phase {state.phase.number}/{phase_count} seq {state.phase.seq_len:>4} step {done:>5}/{planned} "
        f"loss {record['loss_nats_per_token']:.4f} bpb {record['bits_per_byte']:.4f} lr {record['learning_rate']:.2e} "
        f"norm {record['grad_norm']:.2f} {record['tokens_per_second']:,.0f} tok/s{mfu} "
        f"{record['peak_memory_bytes'] / GIB:.1f} GiB {state.tokens_total:,} tokens{skipped}, "
        f"left {clock(record['phase_seconds_left'])}, run {clock(record['run_seconds_left'])}"
    )


def _peak_memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
