"""One phase in this process: build, resume, train, commit, validate."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from megatron.core import parallel_state
from torch.utils.data import DataLoader

from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.checkpoint.going_on import gone_on
from yxanul_nemo.checkpoint.identity import expected_run, phase_plan
from yxanul_nemo.checkpoint.ledger import Ledger, PhaseRecord
from yxanul_nemo.checkpoint.shards import ShardReader
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.load import to_yaml
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import NumberFormat
from yxanul_nemo.curriculum.adapt import adapted_blend
from yxanul_nemo.curriculum.phases import (
    Phase,
    check_chunks,
    check_enough_tokens,
    plan_phases,
    source_sizes,
    total_tokens,
)
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.data.windows import PhaseBatches, PhaseWindows, corpus_shards, open_sources
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import logger
from yxanul_nemo.machine.agreement import any_rank, from_first_rank, largest_of_ranks
from yxanul_nemo.machine.runtime import init_process_groups, resolve_device
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.model.fp8_state import without_absent_scales
from yxanul_nemo.model.memory import with_micro_batch
from yxanul_nemo.training.backend import Backend, forget_backends
from yxanul_nemo.training.callbacks import BetweenSteps
from yxanul_nemo.training.make_backend import make_backend
from yxanul_nemo.training.metrics import StepMeter
from yxanul_nemo.training.micro_batch import fit_batch, gpu_memory_bytes
from yxanul_nemo.training.module import PhaseModule
from yxanul_nemo.training.precision_choice import faster_of, formats_for
from yxanul_nemo.training.random_state import restore_random_state, sharded_random_state
from yxanul_nemo.training.reading import current_windows, plan_reading
from yxanul_nemo.training.records import Recorder, Show, log_line, peak_flops_per_second
from yxanul_nemo.training.saving import CheckpointSaver
from yxanul_nemo.training.signals import StopNow, StopRequest
from yxanul_nemo.training.sinks import log_validation, make_sinks
from yxanul_nemo.training.validating import ValidateWithin
from yxanul_nemo.training.watchdog import Watchdog
from yxanul_nemo.validation.record import metric_of, phase_result_path, ratios_after
from yxanul_nemo.validation.stage import identified, validate_model
from yxanul_nemo.validation.table import table


class PhaseSession:
    """Everything that training one phase needs, built once.

    Args:
        show: what shows the first rank's records to people.

    Raises:
        UserError: no data, too little of it, a machine that cannot run the recipe, or a checkpoint of another run.
    """

    def __init__(self, config: RunConfig, number: int, show: Show = log_line):
        self.show = show
        self.manifest = load_manifest(config.data_dir)
        self.sizes = source_sizes(config, self.manifest)
        self.phases = plan_phases(config.curriculum)
        check_enough_tokens(config, self.phases, self.sizes)
        self.phase: Phase = self.phases[number - 1]
        check_chunks(self.phase, config.parallel.context_parallel)
        self.device = resolve_device(config.parallel)
        self.asked_for = config
        """What `self.config` has numbers and names for where this says auto."""
        self.config = with_micro_batch(config, self.manifest.vocab_size, gpu_memory_bytes(self.device))
        self.store = CheckpointStore.of_run(config)
        init_process_groups(config.parallel, self.device, config.run.seed)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.checkpoint: Checkpoint | None = self._checkpoint_to_go_on_from()
        """The one whose state is loaded."""
        self.under_way = self._under_way()
        self._build()
        self.ledger = self._resume()
        self.windows = self._windows()

    def run(self, stop: StopRequest) -> bool:
        """Train to the end of the phase and validate; True if all of that is done, False if stopped on request."""
        done = self._run(stop)
        # Not after an error: other ranks may never come to where this one waits for them.
        self.backend.close()
        return done

    def _run(self, stop: StopRequest) -> bool:
        first_step = self.ledger.phase_tokens // self.phase.tokens_per_step
        saver: CheckpointSaver | None = None
        if first_step < self.phase.steps:
            module, saver = self._train(first_step, stop)
            if module.steps_done < self.phase.steps or any_rank(bool(stop)):
                saver.wait()
                logger.info("stopped by %s at %s tokens, saved", stop.reason or "a rank", f"{module.tokens_total:,}")
                return False
        try:
            with stop.at_once():
                self._validate(saver)
        except StopNow:
            logger.info("stopped by %s before the end of validation", stop.reason)
            return False
        finally:
            if saver is not None:
                saver.wait()
        return True

    def _checkpoint_to_go_on_from(self) -> Checkpoint | None:
        number = self.phase.number
        checkpoint = from_first_rank(self.store.newest_good)
        if checkpoint is not None and checkpoint.phase > number:
            # The phase was trained; what may be missing is its validation.
            checkpoint = from_first_rank(lambda: self.store.newest_good(phase_end_of=number)) or checkpoint
        return checkpoint

    def _under_way(self) -> PhaseRecord | None:
        """What is recorded of this phase if it was begun."""
        ledger = self.checkpoint.read_ledger() if self.checkpoint is not None else None
        return ledger.current if ledger is not None and ledger.phase == self.phase.number else None

    def _build(self) -> None:
        """Model, optimizer and batch layout, in the number format of the phase."""
        data_parallel = parallel_state.get_data_parallel_world_size()
        if self.device == "cuda":
            # Of a phase before it in this process.
            forget_backends(self.device)
        formats = formats_for(self.config, self.phase, self.under_way, data_parallel, self.device)
        self._build_in(formats[0], data_parallel)
        if len(formats) == 1:
            return
        chosen = faster_of(
            formats,
            self.layout.micro_batch_size * self.phase.seq_len,
            self.backend.seconds_per_micro_batch,
            largest_of_ranks,
            self.phase.number,
        )
        if chosen != formats[0]:
            del self.backend
            forget_backends(self.device)
            self._build_in(chosen, data_parallel)

    def _build_in(self, number_format: NumberFormat, data_parallel: int) -> None:
        precision = self.config.precision.named(number_format)
        self.config = config = self.config.model_copy(update={"precision": precision})
        model = build_model(
            config.model,
            self.manifest.vocab_size,
            config.precision,
            config.parallel,
            config.run.seed,
            seq_len=self.phase.seq_len,
        )
        self.backend: Backend = make_backend(model, config, self.device, self.manifest.eos_id)
        self.layout = fit_batch(
            self.phase,
            data_parallel,
            self._most_tokens(),
            config.precision.token_multiple,
            self.backend.prepare,
            any_rank,
        )

    def _most_tokens(self) -> int:
        """Of a micro-batch: as configured, or what a phase under way was found to fit into."""
        if self.asked_for.parallel.micro_batch_tokens == "auto" and self.under_way is not None:
            return self.under_way.micro_batch_size * self.phase.seq_len
        return self.config.parallel.micro_batch_tokens

    def _resume(self) -> Ledger:
        number, checkpoint = self.phase.number, self.checkpoint
        expected = expected_run(self.asked_for, self.manifest, self.phases)
        if checkpoint is None:
            ledger = Ledger.fresh(expected)
        else:
            ledger = gone_on(checkpoint.read_ledger(), expected, self.config.allow, checkpoint.path)
            self._load(checkpoint)
        if ledger.phase == number:
            return self._as_trained_here(ledger)
        if ledger.phase != number - 1 or (ledger.current is not None and not ledger.current.finished):
            raise UserError(
                f"phases={number}",
                f"the run stands in phase {ledger.phase} after {ledger.tokens_total:,} tokens",
                f"the end of phase {number - 1}",
                f"Run `python launcher.py stage=train` without phases=, or with phases={max(1, ledger.phase)}-{number}.",
            )
        self.backend.guard.reset()
        begun = ledger.start_phase(
            phase_plan(self.phase), self.layout.micro_batch_size, self.world_size, self._adapted_blend(ledger)
        )
        return self._as_trained_here(begun)

    def _as_trained_here(self, ledger: Ledger) -> Ledger:
        ledger = ledger.with_layout(self.layout.micro_batch_size, self.world_size)
        return ledger.with_precision(self.config.precision.name)

    def _adapted_blend(self, ledger: Ledger) -> dict[str, float] | None:
        """The shares of the phase that begins, where `curriculum.adapt_blend` moves them; not of the first, before any validation."""
        if not self.config.curriculum.adapt_blend or ledger.phase == 0:
            return None
        ratios = from_first_rank(lambda: ratios_after(self.config.run.dir, ledger.phase, ledger.tokens_total))
        return adapted_blend(self.config, self.phase.blend, self.sizes, ratios)

    def _load(self, checkpoint: Checkpoint) -> None:
        reader, state = ShardReader(checkpoint.path), self._state()
        held = without_absent_scales(state, reader.keys())
        reader.load_into(held)
        self.backend.after_load()
        if len(held) < len(state):
            logger.info(
                "%s has no FP8 scales for these layers; they start afresh, from passes with its weights",
                checkpoint.path,
            )
            self.backend.prepare(self.layout.micro_batch_size, self.layout.accumulation, self.phase.seq_len)
        restore_random_state(state, self.device)
        logger.info("loaded %s (%s tokens)", checkpoint.path, f"{checkpoint.tokens:,}")

    def _state(self) -> dict[str, Any]:
        return self.backend.sharded_state() | sharded_random_state(self.device)

    def _windows(self) -> PhaseWindows:
        names = self.config.data.source_names
        self.shares = normalized_shares(names, self.ledger.current.adapted_blend or self.phase.blend, self.sizes)
        self.ledger = plan_reading(self.ledger, names, self.shares)
        data = self.config.data
        sources = open_sources(corpus_shards(self.config, self.manifest), data.seed, data.chunk_tokens)
        return current_windows(self.ledger, names, sources, data.shuffle_tokens)

    def _train(self, first_step: int, stop: StopRequest) -> tuple[PhaseModule, CheckpointSaver]:
        """Train to the end or to a stop; the last save may still be under way."""
        config, phase = self.config, self.phase
        saver = CheckpointSaver(self.store, self._state, to_yaml(config), config.checkpoint.asynchronous)
        module = PhaseModule(
            self.backend,
            phase,
            self.windows,
            config.data.source_names,
            self.ledger,
            config.optim,
            total_tokens(self.phases),
            StepMeter(self._bytes_per_token(), self._flops_per_token(self.phase)),
            config.precision.bf16_first_tokens,
        )
        batches = PhaseBatches(
            self.windows,
            self.layout,
            parallel_state.get_data_parallel_rank(),
            first_step,
            phase.steps,
            pinned=self.device == "cuda",
        )
        logger.info(
            "phase %d: seq_len %d, %d steps of %s tokens = %d ranks x %d x micro-batch %d, from step %d",
            phase.number,
            phase.seq_len,
            phase.steps,
            f"{phase.tokens_per_step:,}",
            self.layout.data_parallel,
            self.layout.accumulation,
            self.layout.micro_batch_size,
            first_step,
        )
        if module.tokens_total < config.precision.bf16_first_tokens:
            logger.info("in BF16 up to %s tokens of the run, then in FP8", f"{config.precision.bf16_first_tokens:,}")
        watchdog = Watchdog(config.guards.hang_seconds, f"rank {self.rank}", others=self.world_size > 1)
        trainer = pl.Trainer(
            accelerator="gpu" if self.device == "cuda" else "cpu",
            strategy=SingleDeviceStrategy(device=self._torch_device()),
            # Not the scheduler's environment, which Lightning would check and requeue jobs in.
            plugins=[LightningEnvironment()],
            max_epochs=1,
            logger=make_sinks(config, self.ledger.tokens_total) if self.rank == 0 else [],
            callbacks=[*self._validating(stop), BetweenSteps(config, saver, stop, watchdog, self._recorder())],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        try:
            with watchdog:
                trainer.fit(module, self._loader(batches))
        except Exception:
            # What is being saved is good, whatever happened to training since.
            saver.wait()
            raise
        return module, saver

    def _loader(self, batches: PhaseBatches) -> DataLoader:
        # Each loader draws a seed for workers, which there are none of; it is not to come from the generator that is saved.
        own = torch.Generator().manual_seed(0)
        return DataLoader(batches, batch_size=None, generator=own)

    def _validating(self, stop: StopRequest) -> list[pl.Callback]:
        if self.config.validation.every_tokens is None:
            return []
        return [ValidateWithin(self.config, self.manifest, self.device, stop)]

    def _torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    def _bytes_per_token(self) -> float:
        ratios = [
            self.manifest.sources[name].text_bytes("train") / max(1, self.sizes[name])
            for name in self.config.data.source_names
        ]
        return float(sum(share * ratio for share, ratio in zip(self.shares, ratios, strict=True)))

    def _flops_per_token(self, phase: Phase) -> float:
        return training_flops_per_token(self.config.model, self.manifest.vocab_size, phase.seq_len)

    def _recorder(self) -> Recorder:
        flops = [self._flops_per_token(phase) for phase in self.phases]
        peak = peak_flops_per_second(self.config.precision, self.device, self.world_size)
        return Recorder(self.phases, flops, self.device, peak, self.show if self.rank == 0 else log_line)

    def _validate(self, saver: CheckpointSaver | None) -> None:
        """Validate while the phase's end may still be written; only then is it marked and the phase done."""
        scores = validate_model(self.config, self.manifest, self.backend.model, self.phase.seq_len, self.device)
        checkpoint = self.checkpoint if saver is None else saver.wait()
        assert checkpoint is not None and checkpoint.phase_end, "the phase's end was just saved or loaded"
        if self.rank == 0:
            result = identified(scores, self.config, checkpoint)
            metric = self.config.validation.best_metric
            self.store.mark_best(checkpoint, metric, metric_of(result, metric))
            log_validation(self.config, result)
            # Last, because the phase counts as done by it.
            write_json_atomic(phase_result_path(self.config.run.dir, self.phase.number), result)
            logger.info("validation after phase %d:\n%s", self.phase.number, table(result))
        dist.barrier()
