"""What a run would do on more GPUs, on paper: measured compute of one GPU, stated speeds of links, and what training sends over them.

A step of a data-parallel rank is its micro-batches one after another, then one reduction of all gradients in FP32, and, where ranks share
out the optimizer (`parallel.distributed_optimizer`), an all-gather of the updated parameters. `plan.overlap` is the share of the reduction
that computing hides (`parallel.overlap_gradients`). `benchmarks/two_gpus.py` prints what this says beside what it measures; the constants
below and the shares of link speed in `conf/plan` are from two H100 (2026-11-25, BENCHMARKS.md), and steps measured there are within 4%.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import Phase, batch_layout
from yxanul_nemo.errors import UserError
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.plan.links import Links

GRADIENT_BYTES = 4
"""FP32 in all precisions."""
ROUNDED_BYTES = 2
"""A parameter as layers see it, BF16 but in FP32 training."""
ACTIVATION_BYTES = 2
"""BF16, between tensor-parallel ranks."""
TENSOR_ALL_REDUCES_PER_LAYER = 4
"""After attention and after the feed-forward block, forward and backward (Shoeybi et al., arXiv:1909.08053)."""

TENSOR_REPEATED_SHARE = 0.15
"""Of one GPU's computing, what each tensor-parallel rank does all the same: norms, residuals, RoPE, and products that narrow ones lose by.
121.9 ms of 212.3 were left with two ranks."""
CONTEXT_REPEATED_SHARE = 0.05
"""The same of context-parallel ranks: 111.9 ms of 212.3."""
RING_SHARE = 0.26
"""Speed at which context-parallel ranks pass keys and values on, of that of large collectives: 0.26 ms for 16.8 MB."""

RankSpeed = Callable[[int, int, int], float]
"""(window length, tokens of a micro-batch, micro-batches of a step) -> tokens per second of one GPU that holds the whole model."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step; seconds."""

    compute_seconds: float
    communication_seconds: float
    """What computing does not hide."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute_seconds + self.communication_seconds

    @property
    def communication_share(self) -> float:
        """Of the step's time."""
        return self.communication_seconds / self.seconds


@dataclass(frozen=True)
class PhaseAtScale:
    """One phase on so many GPUs; the names are the keys of `plan.json`."""

    number: int
    seq_len: int
    tokens_per_step: int
    """What the recipe says."""
    forced_tokens_per_step: int
    """The least, from there on, that gives every rank whole windows."""
    tokens_per_rank: int
    """Of a forced step, for each data-parallel rank."""
    step_seconds: float
    communication_share: float
    efficiency: float
    """Tokens per second of each GPU against those of one GPU alone with the recipe's steps."""
    full_tokens_per_step: int
    """With one micro-batch of `parallel.micro_batch_tokens` for each rank."""
    full_communication_share: float
    full_efficiency: float


@dataclass(frozen=True)
class RunAtScale:
    """The whole run on so many GPUs; the names are the keys of `plan.json`."""

    gpus: int
    nodes: int
    tokens_per_second: float
    """Over the whole run."""
    total_seconds: float
    gpu_hours: float
    communication_share: float
    efficiency: float
    full_efficiency: float
    """The same if every step had a full micro-batch for each rank."""
    phases: list[PhaseAtScale]


class Simulator:
    """Times steps of a run on a number of GPUs.

    Args:
        speed: of one GPU.
        vocab_size: ids of the tokenizer.
    """

    def __init__(self, config: RunConfig, speed: RankSpeed, vocab_size: int):
        self.config, self.speed = config, speed
        self.links = Links.of(config.plan)
        self.parameters = parameter_count(config.model, config.model.padded_vocab_size(vocab_size))
        self.model_ranks = config.parallel.tensor_parallel * config.parallel.context_parallel

    def step(self, seq_len: int, micro_batch_tokens: int, accumulation: int, gpus: int) -> StepTime:
        """One step of `accumulation` micro-batches on each data-parallel rank."""
        parallel = self.config.parallel
        left = _share_left(parallel.tensor_parallel, TENSOR_REPEATED_SHARE)
        left *= _share_left(parallel.context_parallel, CONTEXT_REPEATED_SHARE)
        compute = left * accumulation * micro_batch_tokens / self.speed(seq_len, micro_batch_tokens, accumulation)
        inside = accumulation * self._model_parallel_seconds(micro_batch_tokens)
        reduce, gather = self._data_parallel_seconds(gpus)
        return StepTime(compute, inside + (1 - self.config.plan.overlap) * reduce + gather)

    def run(self, phases: list[Phase], gpus: int) -> RunAtScale:
        """All phases; steps that the ranks could not share are made larger."""
        if gpus % self.model_ranks:
            raise UserError(
                "plan.scale_to",
                f"{gpus} GPUs in groups of {self.model_ranks}",
                f"a number that {self.model_ranks} divides",
            )
        rows, seconds, communication, alone, full = [], 0.0, 0.0, 0.0, 0.0
        for phase in phases:
            row, spent = self._phase(phase, gpus)
            # In proportion to tokens: a forced step is larger, and there are fewer of them.
            steps = phase.tokens / row.forced_tokens_per_step
            seconds += steps * spent.seconds
            communication += steps * spent.communication_seconds
            alone += steps * spent.seconds * row.efficiency
            full += steps * spent.seconds * row.efficiency / row.full_efficiency
            rows.append(row)
        return RunAtScale(
            gpus=gpus,
            nodes=math.ceil(gpus / self.links.gpus_per_node),
            tokens_per_second=sum(phase.tokens for phase in phases) / seconds,
            total_seconds=seconds,
            gpu_hours=seconds / 3600 * gpus,
            communication_share=communication / seconds,
            efficiency=alone / seconds,
            full_efficiency=alone / full,
            phases=rows,
        )

    def _phase(self, phase: Phase, gpus: int) -> tuple[PhaseAtScale, StepTime]:
        config, data_parallel = self.config, gpus // self.model_ranks
        forced = forced_tokens_per_step(config, phase, data_parallel)
        step = self.step(phase.seq_len, *self._layout(phase, forced, data_parallel), gpus)
        most = max(phase.seq_len, config.parallel.micro_batch_tokens // phase.seq_len * phase.seq_len)
        full = self.step(phase.seq_len, most, 1, gpus)
        one = self._alone_tokens_per_second(phase)
        row = PhaseAtScale(
            number=phase.number,
            seq_len=phase.seq_len,
            tokens_per_step=phase.tokens_per_step,
            forced_tokens_per_step=forced,
            tokens_per_rank=forced // data_parallel,
            step_seconds=step.seconds,
            communication_share=step.communication_share,
            efficiency=forced / step.seconds / gpus / one,
            full_tokens_per_step=most * data_parallel,
            full_communication_share=full.communication_share,
            full_efficiency=most * data_parallel / full.seconds / gpus / one,
        )
        return row, step

    def _alone_tokens_per_second(self, phase: Phase) -> float:
        """Of one GPU that does the recipe's steps by itself, which is what `stage=plan` forecasts for one GPU."""
        return self.speed(phase.seq_len, *self._layout(phase, phase.tokens_per_step, 1))

    def _layout(self, phase: Phase, tokens_per_step: int, data_parallel: int) -> tuple[int, int]:
        """(tokens of a micro-batch, micro-batches) of a rank."""
        resized = replace(phase, tokens_per_step=tokens_per_step)
        size, accumulation = batch_layout(
            resized, data_parallel, self.config.parallel.micro_batch_tokens, self.config.precision.token_multiple
        )
        return size * phase.seq_len, accumulation

    def _data_parallel_seconds(self, gpus: int) -> tuple[float, float]:
        """(to reduce gradients, to gather parameters)."""
        tensor_parallel = self.config.parallel.tensor_parallel
        parameters, ranks = self.parameters / tensor_parallel, gpus // tensor_parallel
        if not self.config.parallel.shares_optimizer:
            return self.links.all_reduce_seconds(GRADIENT_BYTES * parameters, ranks, tensor_parallel), 0.0
        bytes_each = GRADIENT_BYTES if self.config.precision.name == "fp32" else ROUNDED_BYTES
        reduce = self.links.scatter_seconds(GRADIENT_BYTES * parameters, ranks, tensor_parallel)
        return reduce, self.links.scatter_seconds(bytes_each * parameters, ranks, tensor_parallel)

    def _model_parallel_seconds(self, micro_batch_tokens: int) -> float:
        """What tensor- and context-parallel ranks send for one micro-batch; computing hides none of it here."""
        model, parallel = self.config.model, self.config.parallel
        tokens = micro_batch_tokens / parallel.context_parallel
        activations = ACTIVATION_BYTES * tokens * model.hidden_size
        tensor = self.links.all_reduce_seconds(activations, parallel.tensor_parallel)
        # Each rank passes its keys and values around the ring, and in the backward pass these and their gradients.
        keys_values = 2 * ACTIVATION_BYTES * tokens * model.kv_groups * model.head_dim / parallel.tensor_parallel
        hops = 3 * (parallel.context_parallel - 1)
        context = hops * (keys_values / (RING_SHARE * self.links.node_bytes_per_second) + self.links.node_seconds)
        return model.num_layers * (TENSOR_ALL_REDUCES_PER_LAYER * tensor + context)


def _share_left(ranks: int, repeated: float) -> float:
    """Part of one GPU's computing that each of `ranks` does which share it, but for what each repeats."""
    return repeated + (1 - repeated) / ranks


def forced_tokens_per_step(config: RunConfig, phase: Phase, data_parallel: int) -> int:
    """The phase's tokens per step, or the next number that so many ranks can share in whole windows of allowed micro-batches."""
    unit = math.lcm(phase.seq_len, config.precision.token_multiple) * data_parallel
    return math.ceil(phase.tokens_per_step / unit) * unit


def gpu_counts(scale_to: int, model_ranks: int) -> list[int]:
    """1, 2, 4, ... times the GPUs of one model, and `scale_to` itself."""
    counts = [model_ranks << i for i in range(scale_to.bit_length()) if model_ranks << i < scale_to]
    return [*counts, scale_to]
