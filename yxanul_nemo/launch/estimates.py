"""Forecasts of speed and memory: measurements of the 197M model on one H100, carried over to other models and GPUs by FLOPs and widths.

Each forecast says how it was made. One formula serves all cases and returns a measurement exactly where there is one:
tokens/s = (FLOP/s reached at this length on an H100) x (peak of the GPU / peak of an H100) / (FLOPs per token of the model).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.gpu_table import BY_KEY, Gpu
from yxanul_nemo.model.counts import parameter_count, training_flops_per_token

GIB = 1 << 30
MEASURED_ON = "one H100 SXM, 197M model, 2026-11-22"
MEASURED_GPU = BY_KEY["h100"]
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
MEASURED_MICRO_BATCH_TOKENS = 32_768

FP8_TOKENS_PER_SECOND = {8: 275e3, 16: 292e3, 512: 336e3, 2048: 284e3}
"""By sequence length: fp8_hybrid, micro-batches of 32,768 tokens, Transformer Engine layers, CUDA graph."""
FP8_TOKENS_PER_SECOND_AT_65536 = 296e3
"""The same at 2048 with micro-batches of 65,536 tokens."""
BF16_TOKENS_PER_SECOND = 256e3
"""The same at 2048 in BF16, micro-batches of 32,768 tokens."""
PEAK_MEMORY_BYTES = {"fp8": {32_768: 20.5 * GIB, 65_536: 37.3 * GIB}, "bf16": {32_768: 22.7 * GIB, 65_536: 41.8 * GIB}}
"""By micro-batch tokens, at 2048."""

FP32_SHARE_OF_PEAK = 0.5
"""Assumed of a GPU in FP32; not measured."""
CPU_FLOPS_PER_SECOND_PER_CORE = 40e9
"""Model FLOP/s of one core in FP32: 67 to 87 GFLOP/s were measured on two cores of an AMD EPYC with the demo, 2026-11-22."""

STATE_BYTES_PER_PARAMETER = 18
"""On a GPU: BF16 parameter 2, FP32 main parameter 4, two FP32 moments 8, FP32 gradient 4."""
FP32_STATE_BYTES_PER_PARAMETER = 16
"""The same where the parameter is its own main parameter."""
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""On disk: FP32 main parameter 4, two FP32 moments 8."""

Basis = Literal["measured", "interpolated", "roofline"]


@dataclass(frozen=True)
class Speed:
    """Forecast of one rank's training speed."""

    tokens_per_second: float
    basis: Basis
    """`measured`: such a run was timed; `interpolated`: between or beside timed ones of this model and GPU; `roofline`: from FLOPs."""
    source: str
    """Where the figure comes from, in words."""


def forecast_speed(
    model: ModelConfig,
    vocab_size: int,
    precision: PrecisionConfig,
    gpu: Gpu | None,
    seq_len: int,
    micro_batch_tokens: int,
    cpu_cores: int = 1,
) -> Speed:
    """Training speed of one rank that holds the whole model.

    Args:
        gpu: None for a CPU, with `cpu_cores` of them for this rank.
        seq_len: length of the windows, in tokens.
        micro_batch_tokens: tokens of one micro-batch of this rank.
    """
    flops = training_flops_per_token(model, vocab_size, seq_len)
    if gpu is None:
        rate = CPU_FLOPS_PER_SECOND_PER_CORE * cpu_cores / flops
        reached = f"{CPU_FLOPS_PER_SECOND_PER_CORE / 1e9:g} GFLOP/s per core, {cpu_cores} of them, as measured with the demo's model"
        return Speed(rate, "roofline", reached)
    if precision.name == "fp32":
        rate = FP32_SHARE_OF_PEAK * gpu.fp32_flops_per_second / flops
        peak = f"{gpu.fp32_flops_per_second / 1e12:g} TFLOP/s of FP32"
        return Speed(rate, "roofline", f"{FP32_SHARE_OF_PEAK:.0%} (assumed) of the peak of {peak}")
    reached = _h100_flops_per_second(precision, seq_len)
    seconds_per_token = flops / (reached * gpu.bf16_flops_per_second / MEASURED_GPU.bf16_flops_per_second)
    if gpu.bf16_flops_per_second == MEASURED_GPU.bf16_flops_per_second:
        # Slower GPUs are full with smaller micro-batches; how small was not measured, so nothing is taken off for them.
        seconds_per_token += _seconds_per_micro_batch() * (1 / micro_batch_tokens - 1 / MEASURED_MICRO_BATCH_TOKENS)
    rate = 1 / seconds_per_token
    if gpu == MEASURED_GPU and _same_shape(model) and vocab_size == MEASURED_VOCAB_SIZE:
        if _was_measured(precision, seq_len, micro_batch_tokens):
            return Speed(rate, "measured", f"measured on {MEASURED_ON}")
        return Speed(rate, "interpolated", f"interpolated between measurements on {MEASURED_ON}")
    peak = f"{gpu.bf16_flops_per_second / 1e12:g} TFLOP/s of BF16 ({gpu.data_sheet})"
    return Speed(rate, "roofline", f"{peak} x the share of its peak reached at this length on {MEASURED_ON}")


def forecast_memory_bytes(
    model: ModelConfig, vocab_rows: int, precision: PrecisionConfig, parallel: ParallelConfig, micro_batch_tokens: int
) -> float:
    """Peak memory of one GPU in training: state, what the process needs besides, and activations in proportion to a micro-batch's tokens.

    Args:
        vocab_rows: rows of the embedding, padding included.
        micro_batch_tokens: tokens of one micro-batch of a data-parallel rank.
    """
    per_token = _activation_bytes_per_token(precision) * _saved_widths(model) / _saved_widths(MEASURED_MODEL)
    is_fp32 = precision.name == "fp32"
    state = FP32_STATE_BYTES_PER_PARAMETER if is_fp32 else STATE_BYTES_PER_PARAMETER
    ranks = parallel.tensor_parallel * parallel.context_parallel
    held = state * parameter_count(model, vocab_rows) / parallel.tensor_parallel
    return held + _process_bytes(precision) + per_token * micro_batch_tokens / ranks


def largest_micro_batch_tokens(
    model: ModelConfig, vocab_rows: int, precision: PrecisionConfig, parallel: ParallelConfig, memory_bytes: float
) -> int:
    """Most tokens of a micro-batch that fit into `memory_bytes` by `forecast_memory_bytes`; 0 or less if even the state does not."""
    held = forecast_memory_bytes(model, vocab_rows, precision, parallel, 0)
    per_token = forecast_memory_bytes(model, vocab_rows, precision, parallel, 1) - held
    return math.floor((memory_bytes - held) / per_token)


def _h100_flops_per_second(precision: PrecisionConfig, seq_len: int) -> float:
    """Model FLOP/s of the measured runs, linear between the logarithms of their lengths and level outside them."""
    lengths = list(FP8_TOKENS_PER_SECOND)
    reached = [rate * _measured_flops_per_token(length) for length, rate in FP8_TOKENS_PER_SECOND.items()]
    fp8 = float(np.interp(math.log2(seq_len), np.log2(lengths), reached))
    return fp8 if precision.is_fp8 else fp8 * BF16_TOKENS_PER_SECOND / FP8_TOKENS_PER_SECOND[2048]


def _measured_flops_per_token(seq_len: int) -> float:
    return training_flops_per_token(MEASURED_MODEL, MEASURED_VOCAB_SIZE, seq_len)


def _seconds_per_micro_batch() -> float:
    """Time that a micro-batch takes whatever its size, from the two sizes that were measured."""
    slower, faster = 1 / FP8_TOKENS_PER_SECOND[2048], 1 / FP8_TOKENS_PER_SECOND_AT_65536
    return (slower - faster) / (1 / MEASURED_MICRO_BATCH_TOKENS - 1 / 65_536)


def _was_measured(precision: PrecisionConfig, seq_len: int, micro_batch_tokens: int) -> bool:
    if precision.name == "bf16":
        return (seq_len, micro_batch_tokens) == (2048, MEASURED_MICRO_BATCH_TOKENS)
    if precision.name != "fp8_hybrid":
        return False
    if micro_batch_tokens == MEASURED_MICRO_BATCH_TOKENS:
        return seq_len in FP8_TOKENS_PER_SECOND
    return (seq_len, micro_batch_tokens) == (2048, 65_536)


def _same_shape(model: ModelConfig) -> bool:
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_groups",
        "head_dim",
        "embedding_rank",
    )
    return all(getattr(model, name) == getattr(MEASURED_MODEL, name) for name in names)


def _saved_widths(model: ModelConfig) -> int:
    """Numbers per token that the layers keep for the backward pass: residual stream and norms 4 H, query and attention output 2 Q,
    keys and values 2 K, the three of SwiGLU 3 F."""
    query, key = model.num_attention_heads * model.head_dim, model.kv_groups * model.head_dim
    return model.num_layers * (4 * model.hidden_size + 2 * query + 2 * key + 3 * model.ffn_hidden_size)


def _activation_bytes_per_token(precision: PrecisionConfig) -> float:
    """Of the measured model, from the two micro-batches that were measured; FP32 is taken as twice BF16."""
    (small_tokens, small_bytes), (large_tokens, large_bytes) = _measured_memory(precision)
    return (large_bytes - small_bytes) / (large_tokens - small_tokens) * (2 if precision.name == "fp32" else 1)


def _process_bytes(precision: PrecisionConfig) -> float:
    """What the measured runs held besides state and activations."""
    (small_tokens, small_bytes), (large_tokens, large_bytes) = _measured_memory(precision)
    per_token = (large_bytes - small_bytes) / (large_tokens - small_tokens)
    rows = MEASURED_MODEL.padded_vocab_size(MEASURED_VOCAB_SIZE)
    return small_bytes - per_token * small_tokens - STATE_BYTES_PER_PARAMETER * parameter_count(MEASURED_MODEL, rows)


def _measured_memory(precision: PrecisionConfig) -> tuple[tuple[int, float], tuple[int, float]]:
    small, large = PEAK_MEMORY_BYTES["fp8" if precision.is_fp8 else "bf16"].items()
    return small, large
