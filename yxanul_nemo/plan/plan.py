"""What a run will do, take and cost, before any of it is spent; beside a run under way, what it really did. No torch, no lock."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.corpus.manifest import MANIFEST_NAME, CorpusManifest, load_manifest
from yxanul_nemo.checkpoint.going_on import require_allowed
from yxanul_nemo.checkpoint.identity import expected_run
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.data import ASSUMED_CHARS_PER_TOKEN, CHARS_PER_TOKEN
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import (
    Phase,
    batch_layout,
    check_chunks,
    check_enough_tokens,
    plan_phases,
    source_sizes,
    total_tokens,
)
from yxanul_nemo.curriculum.phases import tokens_per_source as planned_tokens_per_source
from yxanul_nemo.curriculum.schedule import learning_rate, warmup_tokens
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.gpu_table import Gpu
from yxanul_nemo.machine.gpus import process_count, threads_per_process, world_size
from yxanul_nemo.model.counts import parameter_count, training_flops_per_token
from yxanul_nemo.model.memory import forecast_memory_bytes, with_micro_batch
from yxanul_nemo.plan.estimates import Speed, checkpoint_bytes, forecast_speed
from yxanul_nemo.plan.gpu import check_gpu_precision, choose_gpu, planned_precision
from yxanul_nemo.plan.measured_rates import rate_warnings
from yxanul_nemo.plan.preflight import Need, tokens_bytes_to_come
from yxanul_nemo.plan.progress import PhaseDone, phases_done
from yxanul_nemo.plan.scaling import Simulator
from yxanul_nemo.plan.warnings import plan_warnings

PLAN_VERSION = 1
SUPERBPE_VOCAB_SIZE = 200_005
ASSUMED_VOCAB_SIZE = 50_000


@dataclass(frozen=True)
class PhaseForecast:
    """One phase of the plan; the names are the keys of `plan.json`."""

    number: int
    description: str
    seq_len: int
    tokens: int
    steps: int
    tokens_per_step: int
    micro_batch_size: int
    """Windows per micro-batch and rank."""
    accumulation: int
    """Micro-batches of a rank per step."""
    data_parallel: int
    learning_rate_first: float
    """Of the phase's first step."""
    learning_rate_peak: float
    learning_rate_last: float
    grad_clip: float
    blend: dict[str, float] | None
    """Share of each source; None: in proportion to sizes that are not known yet."""
    text_chars: float
    """Length of a window's text in characters."""
    flops: float
    """Forward and backward of the phase."""
    tokens_per_second: float
    """Of all ranks; an estimate unless its basis is `measured`."""
    tokens_per_second_basis: str
    tokens_per_second_source: str
    seconds: float
    """Steps alone, without start-up, saving and validation."""
    memory_bytes: float | None
    """Peak of one GPU; None on a CPU."""
    done: PhaseDone | None
    """What a run in `run.dir` really did; None where it has not come to this phase."""


@dataclass(frozen=True)
class SourceForecast:
    """One source of a prepared corpus."""

    train_tokens: int
    read_tokens: float
    epochs: float


@dataclass(frozen=True)
class Plan:
    """Everything that `stage=plan` says; the names are the keys of `plan.json`."""

    format: str
    format_version: int
    recipe: str
    run_dir: str
    model: str
    parameters: int
    """The head is tied; padding rows of the embedding are counted."""
    vocab_size: int
    vocab_size_source: str
    tokenizer: str
    precision: str
    gpu: str
    gpu_chosen: str
    """Why this one."""
    gpu_memory_bytes: int | None
    gpus: int
    chars_per_token_source: str
    phases: list[PhaseForecast]
    sources: dict[str, SourceForecast] | None
    """None until the corpus is prepared."""
    total_tokens: int
    total_steps: int
    total_flops: float
    total_seconds: float
    total_gpu_hours: float
    price_per_gpu_hour: float | None
    total_cost: float | None
    checkpoint_bytes: int
    checkpoints_kept: int
    """At most, the one being written included."""
    checkpoints_disk_bytes: int
    warnings: list[str]
    tokens_disk_bytes: float = 0.0
    """What `stage=data` will write; 0 where it is done."""
    needs: list[Need] = field(default_factory=list)
    """What the run needs, and what of it is here."""

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` has it."""
        return asdict(self)


def make_plan(config: RunConfig, found: list[str]) -> Plan:
    """The plan of a configured run.

    Args:
        found: names of this machine's GPUs (`found_gpus()`).

    Raises:
        UserError: training would refuse this run as well, for the same reason.
    """
    gpu, gpu_chosen = choose_gpu(config, found)
    precision = planned_precision(config, gpu)
    check_gpu_precision(precision, gpu)
    ranks, data_parallel = _ranks(config, gpu)
    phases = plan_phases(config.curriculum)
    manifest = load_manifest(config.data_dir) if (config.data_dir / MANIFEST_NAME).exists() else None
    sizes = source_sizes(config, manifest) if manifest else None
    epochs = check_enough_tokens(config, phases, sizes) if sizes else None
    checkpoint = CheckpointStore.of_run(config, verify="size").newest_good()
    ledger = None
    if checkpoint is not None:
        ledger = checkpoint.read_ledger()
        if manifest is not None:
            require_allowed(ledger, expected_run(config, manifest, phases), config.allow, checkpoint.path)
    vocab_size, vocab_size_source = _vocab_size(config, manifest)
    is_auto = config.precision.name == "auto"
    config = config.model_copy(update={"precision": precision})
    config = with_micro_batch(config, vocab_size, gpu.memory_bytes if gpu else None)
    text = _TextLength(config, manifest, sizes)
    done = phases_done(config.run.folder.metrics, ledger, phases)
    forecaster = _Forecaster(config, gpu, ranks, data_parallel, vocab_size, text, total_tokens(phases))
    rows = [forecaster.phase(phase, done.get(phase.number)) for phase in phases]
    seconds = sum(row.seconds for row in rows)
    gpu_hours = seconds / 3600 * ranks
    price = config.plan.price_per_gpu_hour
    parameters = parameter_count(config.model, config.model.padded_vocab_size(vocab_size))
    kept = _checkpoints_kept(config, phases)
    one_checkpoint_bytes = checkpoint_bytes(config.model, vocab_size, with_muon=config.optim.muon is not None)
    return Plan(
        format="yxanul-plan",
        format_version=PLAN_VERSION,
        recipe=config.run.name,
        run_dir=str(config.run.dir),
        model=config.model.name,
        parameters=parameters,
        vocab_size=vocab_size,
        vocab_size_source=vocab_size_source,
        tokenizer=config.tokenizer.name,
        precision=f"auto, planned as {precision.name}" if is_auto else precision.name,
        gpu=gpu.name if gpu else "CPU",
        gpu_chosen=gpu_chosen,
        gpu_memory_bytes=gpu.memory_bytes if gpu else None,
        gpus=ranks,
        chars_per_token_source=text.source,
        phases=rows,
        sources=_sources(phases, sizes, epochs),
        total_tokens=total_tokens(phases),
        total_steps=sum(phase.steps for phase in phases),
        total_flops=sum(row.flops for row in rows),
        total_seconds=seconds,
        total_gpu_hours=gpu_hours,
        price_per_gpu_hour=price,
        total_cost=None if price is None else gpu_hours * price,
        checkpoint_bytes=one_checkpoint_bytes,
        checkpoints_kept=kept,
        checkpoints_disk_bytes=kept * one_checkpoint_bytes,
        tokens_disk_bytes=tokens_bytes_to_come(config, vocab_size),
        warnings=[
            *plan_warnings(config, gpu, found, ranks, rows, vocab_size, vocab_size_source),
            *rate_warnings(config, phases, parameters),
        ],
    )


def learning_rates(config: RunConfig, phase: Phase, total: int) -> tuple[float, float, float]:
    """Learning rate of a phase's first step, of its highest and of its last; `total` is the run's tokens."""

    def of_step(step: int) -> float:
        tokens = phase.first_token + step * phase.tokens_per_step
        return learning_rate(config.optim, tokens, total, phase.lr_scale)

    # It rises to the end of the warm-up and never after it, so the peak is at an end of the phase or beside that point.
    turn = int((warmup_tokens(config.optim, total) - phase.first_token) // phase.tokens_per_step)
    steps = {1, phase.steps, *(min(max(step, 1), phase.steps) for step in (turn, turn + 1))}
    return of_step(1), max(of_step(step) for step in steps), of_step(phase.steps)


class _TextLength:
    """Characters per token of a blend: of the prepared corpus, or else as stated for the tokenizer."""

    def __init__(self, config: RunConfig, manifest: CorpusManifest | None, sizes: Mapping[str, int] | None):
        self.names, self.sizes = config.data.source_names, sizes
        if manifest is not None and sizes is not None:
            self.per_source = [manifest.sources[n].text_bytes("train") / max(1, sizes[n]) for n in self.names]
            self.source = "UTF-8 bytes per token of the prepared corpus"
        else:
            stated = CHARS_PER_TOKEN.get(config.tokenizer.name, ASSUMED_CHARS_PER_TOKEN)
            self.per_source = [stated] * len(self.names)
            known = "measured on English web text" if config.tokenizer.name in CHARS_PER_TOKEN else "assumed"
            self.source = f"{stated:g} characters per token, {known}; the corpus is not prepared yet"

    def blend(self, phase: Phase) -> dict[str, float] | None:
        """Share of each source; None while it depends on sizes that are not known."""
        if self.sizes is None and not phase.blend:
            return {self.names[0]: 1.0} if len(self.names) == 1 else None
        shares = normalized_shares(self.names, phase.blend, self.sizes or {})
        return dict(zip(self.names, shares.tolist(), strict=True))

    def chars(self, phase: Phase) -> float:
        """Length of a window's text."""
        blend = self.blend(phase) or {self.names[0]: 1.0}
        per_token = sum(blend.get(name, 0.0) * ratio for name, ratio in zip(self.names, self.per_source, strict=True))
        return per_token * phase.seq_len


@dataclass(frozen=True)
class _Forecaster:
    config: RunConfig
    gpu: Gpu | None
    ranks: int
    data_parallel: int
    vocab_size: int
    text: _TextLength
    total_tokens: int

    def phase(self, phase: Phase, done: PhaseDone | None) -> PhaseForecast:
        config = self.config
        parallel, precision = config.parallel, config.precision
        check_chunks(phase, parallel.context_parallel)
        micro_batch_size, accumulation = batch_layout(
            phase, self.data_parallel, parallel.fixed_micro_batch_tokens, precision.token_multiple
        )
        micro_batch_tokens = micro_batch_size * phase.seq_len
        speed = self._speed(phase.seq_len, micro_batch_tokens, accumulation)
        if self.gpu is None:
            # A CPU's ranks send through memory; that was not measured and is small beside their computing.
            tokens_per_second = speed.tokens_per_second * self.ranks
        else:
            step = self._simulator().step(phase.seq_len, micro_batch_tokens, accumulation, self.ranks)
            tokens_per_second = phase.tokens_per_step / step.seconds
        memory_bytes = None
        if self.gpu is not None:
            rows = config.model.padded_vocab_size(self.vocab_size)
            memory_bytes = forecast_memory_bytes(
                config.model,
                rows,
                precision,
                parallel,
                micro_batch_tokens,
                self.data_parallel,
                with_muon=config.optim.muon is not None,
            )
        first, peak, last = learning_rates(config, phase, self.total_tokens)
        return PhaseForecast(
            number=phase.number,
            description=phase.description,
            seq_len=phase.seq_len,
            tokens=phase.tokens,
            steps=phase.steps,
            tokens_per_step=phase.tokens_per_step,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            data_parallel=self.data_parallel,
            learning_rate_first=first,
            learning_rate_peak=peak,
            learning_rate_last=last,
            grad_clip=phase.grad_clip,
            blend=self.text.blend(phase),
            text_chars=self.text.chars(phase),
            flops=phase.tokens * training_flops_per_token(config.model, self.vocab_size, phase.seq_len),
            tokens_per_second=tokens_per_second,
            tokens_per_second_basis=speed.basis,
            tokens_per_second_source=speed.source,
            seconds=phase.tokens / tokens_per_second,
            memory_bytes=memory_bytes,
            done=done,
        )

    def _simulator(self) -> Simulator:
        def speed(seq_len: int, micro_batch_tokens: int, accumulation: int) -> float:
            return self._speed(seq_len, micro_batch_tokens, accumulation).tokens_per_second

        return Simulator(self.config, speed, self.vocab_size)

    def _speed(self, seq_len: int, micro_batch_tokens: int, accumulation: int) -> Speed:
        """Of one rank that holds the whole model."""
        config = self.config
        cores = threads_per_process(config, min(self.ranks, process_count(config)))
        shares = self.data_parallel if config.parallel.shares_optimizer else 1
        return forecast_speed(
            config.model,
            self.vocab_size,
            config.precision,
            config.parallel,
            self.gpu,
            seq_len,
            micro_batch_tokens,
            accumulation,
            cores,
            0.0 if config.optim.muon is None else 1 / shares,
        )


def _ranks(config: RunConfig, gpu: Gpu | None) -> tuple[int, int]:
    """(processes, data-parallel ranks) of the run; `plan.gpus` decides, else what the run itself would start here."""
    parallel = config.parallel
    ranks = config.plan.gpus
    if ranks == "auto":
        on_cpu_by_choice = gpu is None and parallel.processes_per_node == "auto"
        ranks = 1 if on_cpu_by_choice else world_size(config)
    model_ranks = parallel.tensor_parallel * parallel.context_parallel
    if ranks % model_ranks:
        raise UserError(
            "plan.gpus",
            f"{ranks} with parallel.tensor_parallel={parallel.tensor_parallel} and "
            f"parallel.context_parallel={parallel.context_parallel}",
            f"a number that {model_ranks} divides",
        )
    return ranks, ranks // model_ranks


def _vocab_size(config: RunConfig, manifest: CorpusManifest | None) -> tuple[int, str]:
    """Ids of the tokenizer and where the number is from."""
    if manifest is not None:
        return manifest.vocab_size, "the prepared corpus"
    if config.tokenizer.vocab_size is not None:
        return config.tokenizer.vocab_size, "tokenizer.vocab_size"
    if config.tokenizer.kind == "superbpe":
        return SUPERBPE_VOCAB_SIZE, "the released SuperBPE tokenizers"
    return ASSUMED_VOCAB_SIZE, "assumed"


def _sources(
    phases: list[Phase], sizes: Mapping[str, int] | None, epochs: Mapping[str, float] | None
) -> dict[str, SourceForecast] | None:
    if sizes is None or epochs is None:
        return None
    read = planned_tokens_per_source(phases, sizes)
    return {name: SourceForecast(sizes[name], read[name], epochs[name]) for name in sizes}


def _checkpoints_kept(config: RunConfig, phases: list[Phase]) -> int:
    """Most at one time: the ends of phases (the best is one of them), the newest inside phases, and the one being written.

    Where ends are not kept: the newest, the best and the one being written.
    """
    inside = sum(int((phase.tokens - 1) // config.checkpoint.every_tokens) for phase in phases)
    if not config.checkpoint.keep_phase_ends:
        return min(len(phases) + inside, config.checkpoint.keep_latest + 2)
    return len(phases) + min(config.checkpoint.keep_latest, inside)
