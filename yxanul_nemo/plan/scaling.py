"""Time of a step on several GPUs, on paper: measured compute of one GPU, stated speeds of links, and what training sends over them.

A step of a data-parallel rank is its micro-batches one after another, then one reduction of all gradients in FP32, and, where ranks share
out the optimizer (`parallel.distributed_optimizer`), an all-gather of the updated parameters. `benchmarks/two_gpus.py` prints what this
says beside what it measures; the constants below and the defaults of `plan.link_efficiency` are from two H100 (2026-11-25,
BENCHMARKS.md), and steps measured there are within 4%; more than two GPUs have not been measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from yxanul_nemo.config.run import RunConfig
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

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute_seconds + self.communication_seconds


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

    def step(self, seq_len: int, micro_batch_tokens: int, accumulation: int, gpus: int) -> StepTime:
        """One step of `accumulation` micro-batches on each data-parallel rank."""
        parallel = self.config.parallel
        left = _share_left(parallel.tensor_parallel, TENSOR_REPEATED_SHARE)
        left *= _share_left(parallel.context_parallel, CONTEXT_REPEATED_SHARE)
        compute = left * accumulation * micro_batch_tokens / self.speed(seq_len, micro_batch_tokens, accumulation)
        inside = accumulation * self._model_parallel_seconds(micro_batch_tokens)
        reduce, gather = self._data_parallel_seconds(gpus)
        return StepTime(compute, inside + reduce + gather)

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
