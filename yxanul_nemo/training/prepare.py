"""Preparing a phase: from the configuration to everything that its training needs, as one frozen value."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from data_prep.corpus.manifest import CorpusManifest, load_manifest
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.going_on import gone_on
from yxanul_nemo.checkpoint.identity import expected_run, phase_plan
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.shards import ShardReader
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.adapt import adapted_blend
from yxanul_nemo.curriculum.phases import Phase, check_chunks, check_enough_tokens, plan_phases, source_sizes
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.data.windows import BatchLayout, PhaseWindows, corpus_shards, open_sources
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger
from yxanul_nemo.machine.agreement import from_first_rank
from yxanul_nemo.machine.runtime import init_process_groups, resolve_device
from yxanul_nemo.model.fp8_state import without_absent_scales
from yxanul_nemo.model.memory import with_micro_batch
from yxanul_nemo.training.backend import Backend
from yxanul_nemo.training.build import BuiltPhase, build_phase
from yxanul_nemo.training.micro_batch import gpu_memory_bytes
from yxanul_nemo.training.random_state import restore_random_state, sharded_random_state
from yxanul_nemo.training.reading import current_windows, plan_reading
from yxanul_nemo.validation.record import ratios_after


@dataclass(frozen=True)
class PreparedPhase:
    """Everything that training one phase needs; the model has the state of the checkpoint that the phase goes on from."""

    config: RunConfig
    """The configuration with a value wherever the user's says `auto`."""
    manifest: CorpusManifest
    phases: list[Phase]
    """The whole curriculum."""
    phase: Phase
    """The phase to train."""
    device: str
    """`cpu` or `cuda`."""
    store: CheckpointStore
    checkpoint: Checkpoint | None
    """The checkpoint whose state is loaded; None for a new run."""
    ledger: Ledger
    """The ledger at the first step that is trained here."""
    shares: np.ndarray
    """Share of each source in the phase's windows, in the order of `config.data.source_names`."""
    windows: PhaseWindows
    backend: Backend
    """This rank's model and optimizer."""
    layout: BatchLayout

    @property
    def first_step(self) -> int:
        """Steps of the phase that are done."""
        return self.ledger.phase_tokens // self.phase.tokens_per_step

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text behind a token of the phase's blend."""
        sizes = source_sizes(self.config, self.manifest)
        names = self.config.data.source_names
        ratios = [self.manifest.sources[name].text_bytes("train") / max(1, sizes[name]) for name in names]
        return float(sum(share * ratio for share, ratio in zip(self.shares, ratios, strict=True)))

    def sharded_state(self) -> dict[str, Any]:
        """What a checkpoint holds of this rank, as Megatron-core's sharded tensors over live storage."""
        return sharded_state(self.backend, self.device)


def prepare_phase(config: RunConfig, number: int) -> PreparedPhase:
    """Build the model of a phase, load the state that it goes on from, and plan what it reads.

    Args:
        config: as the user gave it.
        number: of the phase, from 1.

    Raises:
        UserError: no data, too little of it, a machine that cannot run the recipe, or a checkpoint of another run.
    """
    manifest = load_manifest(config.data_dir)
    sizes = source_sizes(config, manifest)
    phases = plan_phases(config.curriculum)
    check_enough_tokens(config, phases, sizes)
    phase = phases[number - 1]
    check_chunks(phase, config.parallel.context_parallel)
    device = resolve_device(config.parallel)
    init_process_groups(config.parallel, device, config.run.seed)
    store, began = CheckpointStore.of_run(config), time.perf_counter()
    checkpoint = checkpoint_to_resume(store, number)
    checked = time.perf_counter()
    before = ledger_to_resume(config, manifest, phases, checkpoint, number)
    sized = with_micro_batch(config, manifest.vocab_size, gpu_memory_bytes(device))
    record = before.current if before.phase == number else None
    max_micro_batch_tokens = sized.parallel.fixed_micro_batch_tokens
    if record is not None and config.parallel.micro_batch_tokens == "auto":
        # What the phase was found to fit into when it began.
        max_micro_batch_tokens = record.micro_batch_size * phase.seq_len
    built = build_phase(sized, manifest, phase, device, record, max_micro_batch_tokens)
    ready = time.perf_counter()
    if checkpoint is not None:
        load_state(built, checkpoint, device)
    logger.info(
        "phase %d: checkpoints checked in %.1f s, model built and warmed up in %.1f s, state loaded in %.1f s",
        number,
        checked - began,
        ready - checked,
        time.perf_counter() - ready,
    )
    if record is None:
        built.backend.guard.reset()
        blend = blend_after_validation(config, phase, sizes, before)
        before = before.start_phase(phase_plan(phase), built.layout.micro_batch_size, dist.get_world_size(), blend)
    ledger = before.with_layout(built.layout.micro_batch_size, dist.get_world_size())
    ledger = ledger.with_precision(built.config.precision.name)
    names, data = config.data.source_names, config.data
    assert ledger.current is not None, "the phase was begun"
    shares = normalized_shares(names, ledger.current.adapted_blend or phase.blend, sizes)
    ledger = plan_reading(ledger, names, shares)
    sources = open_sources(corpus_shards(config, manifest), data.seed, data.chunk_tokens)
    return PreparedPhase(
        config=built.config,
        manifest=manifest,
        phases=phases,
        phase=phase,
        device=device,
        store=store,
        checkpoint=checkpoint,
        ledger=ledger,
        shares=shares,
        windows=current_windows(ledger, names, sources, data.shuffle_tokens),
        backend=built.backend,
        layout=built.layout,
    )


def checkpoint_to_resume(store: CheckpointStore, number: int) -> Checkpoint | None:
    """Return the newest good checkpoint, or the one at the end of phase `number` where later phases were trained."""
    checkpoint = from_first_rank(store.newest_good)
    if checkpoint is not None and checkpoint.phase > number:
        # The phase was trained; what may be missing is its validation.
        checkpoint = from_first_rank(lambda: store.newest_good(phase_end_of=number)) or checkpoint
    return checkpoint


def ledger_to_resume(
    config: RunConfig, manifest: CorpusManifest, phases: list[Phase], checkpoint: Checkpoint | None, number: int
) -> Ledger:
    """Return the checkpoint's ledger, or that of a new run.

    Raises:
        UserError: the checkpoint is of another run, or phase `number` does not come next.
    """
    expected = expected_run(config, manifest, phases)
    if checkpoint is None:
        ledger = Ledger.fresh(expected)
    else:
        ledger = gone_on(checkpoint.read_ledger(), expected, config.allow, checkpoint.path)
    is_next = ledger.phase == number - 1 and (ledger.current is None or ledger.current.finished)
    if ledger.phase != number and not is_next:
        raise UserError(
            f"phases={number}",
            f"the run stands in phase {ledger.phase} after {ledger.tokens_total:,} tokens",
            f"the end of phase {number - 1}",
            f"Run `python launcher.py stage=train` without phases=, or with phases={max(1, ledger.phase)}-{number}.",
        )
    return ledger


def load_state(built: BuiltPhase, checkpoint: Checkpoint, device: str) -> None:
    """Give model, optimizer and random generators the state of a checkpoint."""
    reader, state = ShardReader(checkpoint.path), sharded_state(built.backend, device)
    held = without_absent_scales(state, reader.keys())
    reader.load_into(held)
    lacks_scales = len(held) < len(state)
    if lacks_scales:
        logger.info(
            "%s has no FP8 scales for these layers; they start afresh, from passes with its weights", checkpoint.path
        )
    built.backend.after_load(lacks_scales)
    restore_random_state(state, device)
    logger.info("loaded %s (%s tokens)", checkpoint.path, f"{checkpoint.tokens:,}")


def sharded_state(backend: Backend, device: str) -> dict[str, Any]:
    """Return the state of a backend and of this process's random generators."""
    return backend.sharded_state() | sharded_random_state(device)


def blend_after_validation(
    config: RunConfig, phase: Phase, sizes: dict[str, int], ledger: Ledger
) -> dict[str, float] | None:
    """Return the blend that `curriculum.adapt_blend` gives to a phase that begins; None where it moves nothing.

    Args:
        sizes: tokens of each source.
        ledger: at the end of the phase before. The first phase has none, and no validation to go by.
    """
    if not config.curriculum.adapt_blend or ledger.phase == 0:
        return None
    ratios = from_first_rank(lambda: ratios_after(config.run.dir, ledger.phase, ledger.tokens_total))
    return adapted_blend(config, phase.blend, sizes, ratios)
