"""Validation inside a phase: every so many tokens of the run, on a part of the documents, without a trace in the training."""

import time
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import logger
from yxanul_nemo.machine.agreement import any_rank, failing_together, from_first_rank
from yxanul_nemo.model.fp8_state import scaling_state_kept
from yxanul_nemo.training.module import PhaseModule
from yxanul_nemo.training.signals import StopRequest
from yxanul_nemo.validation.record import (
    early_stop_tokens,
    in_phase_result_path,
    in_phase_results,
    settings_fingerprint,
)
from yxanul_nemo.validation.stage import run_domains, validate_at_lengths
from yxanul_nemo.validation.validate import Domains, evenly


class ValidateWithin(pl.Callback):
    """After the step with which the run's tokens pass a multiple of `validation.every_tokens`; not at the end of a phase, which
    is validated in full.

    It stands before the callback that saves: a checkpoint at the same step then comes after the result, and a run that is
    killed in between validates that step again. A step that was to be validated when the run was asked to stop is when it
    goes on. It also asks for an early stop (`validation.early_stop_patience`).
    """

    def __init__(self, config: RunConfig, manifest: CorpusManifest, device: str, stop: StopRequest):
        assert config.validation.every_tokens is not None
        self.config, self.manifest, self.device, self.stop = config, manifest, device, stop
        self._domains: Domains | None = None

    def on_train_start(self, trainer: pl.Trainer, module: PhaseModule) -> None:
        """Forget what will be trained again, and do what was left out at a stop."""
        run_dir, tokens = self.config.run.dir, module.tokens_total
        self.stop.install()
        if dist.get_rank() == 0:
            for of_tokens, path in in_phase_results(run_dir):
                if of_tokens > tokens:
                    logger.info("dropping %s, which will be validated again", path)
                    path.unlink()
        path = in_phase_result_path(run_dir, module.phase.number, tokens)
        if self._is_due(module) and not from_first_rank(path.is_file):
            self._validate(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: PhaseModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate where due."""
        if self._is_due(module) and not any_rank(bool(self.stop)):
            self._validate(trainer, module)

    def _is_due(self, module: PhaseModule) -> bool:
        every, tokens = self.config.validation.every_tokens, module.tokens_total
        passed = tokens // every > (tokens - module.phase.tokens_per_step) // every
        return 0 < module.steps_done < module.phase.steps and passed

    def _validate(self, trainer: pl.Trainer, module: PhaseModule) -> None:
        began = time.perf_counter()
        config, tokens, phase = self.config, module.tokens_total, module.phase
        if self._domains is None:
            most = config.validation.every_documents
            self._domains = {
                name: evenly(documents, most) for name, documents in run_domains(config, self.manifest).items()
            }
        model = module.backend.model
        with scaling_state_kept(model, config.precision):
            model.eval()
            result = validate_at_lengths(config, self.manifest.eos_id, model, self._domains, phase.seq_len, self.device)
            model.train()
        seconds = time.perf_counter() - began
        module.meter.pause(seconds, validating=True)
        about = {
            "settings_fingerprint": settings_fingerprint(config),
            "documents_per_domain": config.validation.every_documents,
            "tokens_total": tokens,
            "phase": phase.number,
        }
        with failing_together(), disk_errors(config.run.dir, "writing a validation result"):
            if dist.get_rank() == 0:
                write_json_atomic(in_phase_result_path(config.run.dir, phase.number, tokens), about | result)
        record = {"validation/mean_bits_per_byte": result["mean_bits_per_byte"]}
        record |= {f"validation/{n}_bits_per_byte": score["bits_per_byte"] for n, score in result["domains"].items()}
        for sink in trainer.loggers:
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
            patience = config.validation.early_stop_patience
            self.stop.reason = f"early stop ({config.validation.best_metric} did not improve {patience} times)"
