"""What training takes of a GPU's memory, and the micro-batch that fits: the 197M model's measured peaks, carried over by widths. No torch.

The peaks are those of `torch.cuda.max_memory_allocated` in `stage=bench` (BENCHMARKS.md).
"""

import math

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.figures import GIB
from yxanul_nemo.model.counts import moment_count, parameter_count
from yxanul_nemo.model.layer_choices import why_not_fused

MEASURED_MODEL = ModelConfig(
    name="yxanul_197m",
    num_layers=28,
    hidden_size=768,
    ffn_hidden_size=2048,
    num_attention_heads=12,
    kv_groups=2,
    head_dim=64,
    embedding_rank=128,
)
MEASURED_VOCAB_SIZE = 200_005
PEAK_MEMORY_BYTES = {
    "fused": {32_768: 19.1 * GIB, 65_536: 34.5 * GIB},
    "fp8": {32_768: 20.5 * GIB, 65_536: 37.3 * GIB},
    "bf16": {32_768: 22.7 * GIB, 65_536: 41.8 * GIB},
}
"""By micro-batch tokens, at 2048; `fp8` with Transformer Engine's modules."""

WORKING_BYTES_PER_PARAMETER = 6
"""On a GPU: BF16 parameter 2, FP32 gradient 4."""
MAIN_BYTES_PER_PARAMETER = 4
"""FP32 main parameter; data-parallel ranks share them and the moments out."""
BYTES_PER_MOMENT = 4
"""FP32."""
FP32_STATE_BYTES_PER_PARAMETER = (8, 0)
"""Parameter and gradient, where the parameter is its own main parameter."""
COMFORTABLE_SHARE = 0.92
"""Of a GPU's memory; above it fragmentation, a display or validation may be what is too much."""
MOST_MICRO_BATCH_TOKENS = 65_536
"""Beyond it a larger micro-batch gains nothing on an H200."""
CPU_MICRO_BATCH_TOKENS = 4_096
"""On a CPU, whose caches a larger one would leave."""


def forecast_memory_bytes(
    model: ModelConfig,
    vocab_rows: int,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    micro_batch_tokens: int,
    data_parallel: int = 1,
    with_muon: bool = False,
) -> float:
    """Peak memory of one GPU in training: state, what the process needs besides, and activations in proportion to a micro-batch's tokens.

    Args:
        vocab_rows: rows of the embedding, padding included.
        micro_batch_tokens: tokens of one micro-batch of a data-parallel rank.
        data_parallel: ranks with different windows.
        with_muon: whether layers' matrices have one moment instead of AdamW's two.
    """
    kind = "fused" if why_not_fused(model, precision, parallel) is None else "fp8" if precision.is_fp8 else "bf16"
    per_token = _activation_bytes_per_token(kind, precision) * _saved_widths(model) / _saved_widths(MEASURED_MODEL)
    working, of_main = WORKING_BYTES_PER_PARAMETER, MAIN_BYTES_PER_PARAMETER
    if precision.name == "fp32":
        working, of_main = FP32_STATE_BYTES_PER_PARAMETER
    shares = data_parallel * parallel.context_parallel if parallel.shares_optimizer else 1
    ranks = parallel.tensor_parallel * parallel.context_parallel
    parameters = parameter_count(model, vocab_rows)
    shared_out = of_main * parameters + BYTES_PER_MOMENT * moment_count(model, vocab_rows, with_muon)
    held = (working * parameters + shared_out / shares) / parallel.tensor_parallel
    return held + _process_bytes(kind) + per_token * micro_batch_tokens / ranks


def largest_micro_batch_tokens(
    model: ModelConfig,
    vocab_rows: int,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    memory_bytes: float,
    with_muon: bool = False,
) -> int:
    """Most tokens of a micro-batch that fit into `memory_bytes` by `forecast_memory_bytes`; 0 or less if even the state does not."""
    held, with_one = (
        forecast_memory_bytes(model, vocab_rows, precision, parallel, tokens, with_muon=with_muon) for tokens in (0, 1)
    )
    per_token = with_one - held
    return math.floor((memory_bytes - held) / per_token)


def with_micro_batch(config: RunConfig, vocab_size: int, memory_bytes: int | None) -> RunConfig:
    """The configuration with a number for `parallel.micro_batch_tokens`: with `auto` what fits into a GPU of `memory_bytes` (None: a CPU).

    Raises:
        UserError: not one window of the longest phase fits.
    """
    if config.parallel.micro_batch_tokens != "auto":
        return config
    longest = max(phase.seq_len for phase in config.curriculum.phases)
    tokens = (
        max(CPU_MICRO_BATCH_TOKENS, longest)
        if memory_bytes is None
        else _fitting(config, vocab_size, longest, memory_bytes)
    )
    parallel = config.parallel.model_copy(update={"micro_batch_tokens": tokens})
    return config.model_copy(update={"parallel": parallel})


def _fitting(config: RunConfig, vocab_size: int, longest_seq_len: int, memory_bytes: int) -> int:
    model, precision, parallel = config.model, config.precision, config.parallel
    vocab_rows = model.padded_vocab_size(vocab_size)
    with_muon = config.optim.muon is not None
    fits = largest_micro_batch_tokens(
        model, vocab_rows, precision, parallel, COMFORTABLE_SHARE * memory_bytes, with_muon
    )
    if fits < longest_seq_len:
        needed = forecast_memory_bytes(model, vocab_rows, precision, parallel, longest_seq_len, with_muon=with_muon)
        raise UserError(
            "parallel.micro_batch_tokens",
            f"is auto, but one window of {longest_seq_len} tokens is expected to take {needed / GIB:.1f} GiB "
            f"of the GPU's {memory_bytes / GIB:.1f}",
            f"at most {COMFORTABLE_SHARE:.0%} of its memory",
            "Choose a smaller model, more tensor-parallel ranks, or a number of tokens to try it all the same.",
        )
    return min(MOST_MICRO_BATCH_TOKENS, fits)


def _saved_widths(model: ModelConfig) -> int:
    """Numbers per token that the layers keep for the backward pass: residual stream and norms 4 H, query and attention output 2 Q,
    keys and values 2 K, the three of SwiGLU 3 F."""
    query, key = model.num_attention_heads * model.head_dim, model.kv_groups * model.head_dim
    return model.num_layers * (4 * model.hidden_size + 2 * query + 2 * key + 3 * model.ffn_hidden_size)


def _activation_bytes_per_token(kind: str, precision: PrecisionConfig) -> float:
    """Of the measured model, from the two micro-batches that were measured; FP32 is taken as twice BF16."""
    (small_tokens, small_bytes), (large_tokens, large_bytes) = PEAK_MEMORY_BYTES[kind].items()
    return (large_bytes - small_bytes) / (large_tokens - small_tokens) * (2 if precision.name == "fp32" else 1)


def _process_bytes(kind: str) -> float:
    """What the measured runs held besides state and activations."""
    (small_tokens, small_bytes), (large_tokens, large_bytes) = PEAK_MEMORY_BYTES[kind].items()
    per_token = (large_bytes - small_bytes) / (large_tokens - small_tokens)
    rows = MEASURED_MODEL.padded_vocab_size(MEASURED_VOCAB_SIZE)
    per_parameter = WORKING_BYTES_PER_PARAMETER + MAIN_BYTES_PER_PARAMETER
    state = per_parameter * parameter_count(MEASURED_MODEL, rows)
    state += BYTES_PER_MOMENT * moment_count(MEASURED_MODEL, rows, with_muon=False)
    return small_bytes - per_token * small_tokens - state
