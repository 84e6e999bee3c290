"""Validation of a model that is being trained: inside a phase without a trace in the training, and at its end."""

import time
from collections.abc import Callable

import torch.distributed as dist

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import logger
from yxanul_nemo.machine.agreement import failing_together, from_first_rank
from yxanul_nemo.model.fp8_state import scaling_state_kept
from yxanul_nemo.training.signals import StopNow
from yxanul_nemo.training.sinks import log_validation
from yxanul_nemo.training.state import TrainingState
from yxanul_nemo.validation.record import (
    early_stop_tokens,
    in_phase_result_path,
    in_phase_results,
    metric_of,
    phase_result_path,
    result_table,
    settings_fingerprint,
)
from yxanul_nemo.validation.stage import identified, run_domains, validate_at_lengths, validate_model
from yxanul_nemo.validation.validate import Domains, evenly


class InPhaseValidation:
    """Validation on a part of the documents, with the step by which the run's tokens pass a multiple of `validation.every_tokens`.

    The end of a phase is not among these steps: it is validated in full. A step that was to be validated when the run was asked to
    stop is when it goes on. It also asks for an early stop (`validation.early_stop_patience`).
    """

    def __init__(self, state: TrainingState):
        self.state, self.settings = state, state.config.validation
        self._domains: Domains | None = None

    def begin(self) -> None:
        """Forget what will be trained again, and do what was left out at a stop."""
        if self.settings.every_tokens is None:
            return
        run_dir, tokens = self.state.config.run.dir, self.state.tokens_total
        if self.state.is_global_zero:
            for of_tokens, path in in_phase_results(run_dir):
                if of_tokens > tokens:
                    logger.info("dropping %s, which will be validated again", path)
                    path.unlink()
        path = in_phase_result_path(run_dir, self.state.phase.number, tokens)
        if self.is_due() and not from_first_rank(path.is_file):
            self.run()

    def is_due(self) -> bool:
        """Whether the step that was just done is to be validated."""
        every, tokens, phase = self.settings.every_tokens, self.state.tokens_total, self.state.phase
        if every is None:
            return False
        passed = tokens // every > (tokens - phase.tokens_per_step) // every
        return 0 < self.state.steps_done < phase.steps and passed

    def run(self) -> None:
        """Validate now; its time is not one of training."""
        began = time.perf_counter()
        state, config, prepared = self.state, self.state.config, self.state.prepared
        tokens, phase, model = state.tokens_total, state.phase, prepared.backend.model
        state.call("on_validation_start")
        if self._domains is None:
            most = self.settings.every_documents
            self._domains = {
                name: evenly(documents, most) for name, documents in run_domains(config, prepared.manifest).items()
            }
        with scaling_state_kept(model, config.precision):
            model.eval()
            result = validate_at_lengths(
                config, prepared.manifest.eos_id, model, self._domains, phase.seq_len, prepared.device
            )
            model.train()
        seconds = time.perf_counter() - began
        about = {
            "settings_fingerprint": settings_fingerprint(config),
            "documents_per_domain": self.settings.every_documents,
            "tokens_total": tokens,
            "phase": phase.number,
        }
        with failing_together(), disk_errors(config.run.dir, "writing a validation result"):
            if state.is_global_zero:
                write_json_atomic(in_phase_result_path(config.run.dir, phase.number, tokens), about | result)
        record = {"validation/mean_bits_per_byte": result["mean_bits_per_byte"]}
        record |= {f"validation/{n}_bits_per_byte": score["bits_per_byte"] for n, score in result["domains"].items()}
        state.callback_metrics |= record
        for sink in state.loggers:
            sink.log_metrics({**record, "validation/seconds": seconds, "phase": phase.number}, step=tokens)
        of_domains = ", ".join(f"{name} {score['bits_per_byte']:.4f}" for name, score in result["domains"].items())
        logger.info(
            "validation at %s tokens: %.4f bits per byte (%s), %.1f s",
            f"{tokens:,}",
            result["mean_bits_per_byte"],
            of_domains,
            seconds,
        )
        if from_first_rank(lambda: early_stop_tokens(config)) == tokens:
            patience = self.settings.early_stop_patience
            state.stop.reason = f"early stop ({self.settings.best_metric} did not improve {patience} times)"
        state.call("on_validation_end")
        state.meter.pause(time.perf_counter() - began, validating=True)


def validate_phase(state: TrainingState, end_of_phase: Callable[[], Checkpoint | None]) -> bool:
    """Validate a trained phase while its end may still be written. Only then is the checkpoint marked and the phase done.

    Args:
        end_of_phase: waits for the checkpoint at the phase's end.

    Returns:
        False if asked to stop.
    """
    try:
        with state.stop.at_once():
            _validate_phase(state, end_of_phase)
    except StopNow:
        logger.info("stopped by %s before the end of validation", state.stop.reason)
        return False
    finally:
        end_of_phase()
    return True


def _validate_phase(state: TrainingState, end_of_phase: Callable[[], Checkpoint | None]) -> None:
    prepared, config, phase = state.prepared, state.config, state.phase
    state.call("on_validation_start")
    scores = validate_model(config, prepared.manifest, prepared.backend.model, phase.seq_len, prepared.device)
    checkpoint = end_of_phase()
    assert checkpoint is not None and checkpoint.phase_end, "the phase's end was just saved or loaded"
    state.callback_metrics["validation/mean_bits_per_byte"] = scores["mean_bits_per_byte"]
    if state.is_global_zero:
        result = identified(scores, config, checkpoint)
        metric = config.validation.best_metric
        prepared.store.mark_best(checkpoint, metric, metric_of(result, metric))
        log_validation(config, result)
        # Last, because the phase counts as done by it.
        write_json_atomic(phase_result_path(config.run.dir, phase.number), result)
        logger.info("validation after phase %d:\n%s", phase.number, result_table(result))
    dist.barrier()
    state.call("on_validation_end")
