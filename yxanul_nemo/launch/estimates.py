"""Forecasts of speed: measurements of the 197M model on one H200, carried over to other models and GPUs by FLOPs.

Each forecast says how it was made. One formula serves all cases and returns a measurement exactly where there is one:
tokens/s = (FLOP/s reached at this length on an H200) x (peak of the GPU / peak of an H200) / (FLOPs per token of the model).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.gpu_table import BY_KEY, Gpu
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.model.memory import MEASURED_MODEL, MEASURED_VOCAB_SIZE

MEASURED_ON = "one H200 SXM, 197M model, 2026-11-23"
MEASURED_GPU = BY_KEY["h200"]
MEASURED_MICRO_BATCH_TOKENS = 32_768

FP8_TOKENS_PER_SECOND = {8: 464e3, 512: 389e3, 2048: 329e3}
"""By sequence length: fp8_hybrid, micro-batches of 32,768 tokens, Transformer Engine layers, CUDA graph."""
FP8_TOKENS_PER_SECOND_AT_16384 = 308e3
"""The same at 2048 with micro-batches of 16,384 tokens."""
BF16_TOKENS_PER_SECOND = 289e3
"""The same at 2048 in BF16, micro-batches of 32,768 tokens."""
H100_SHARE = 0.92
"""Of an H200's speed: 0.89 to 0.93 at the lengths of the h100 curriculum (2026-11-25 against 2026-11-23). Both have the same peak; the
H100's memory is slower."""
FP32_SHARE_OF_PEAK = 0.5
"""Assumed of a GPU in FP32; not measured."""
CPU_FLOPS_PER_SECOND_PER_CORE = 40e9
"""Model FLOP/s of one core in FP32: 67 to 87 GFLOP/s were measured on two cores of an AMD EPYC with the demo, 2026-11-22."""

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
    reached = _measured_flops_per_second(precision, seq_len)
    share = H100_SHARE if gpu.key == "h100" else 1.0
    seconds_per_token = flops / (reached * share * gpu.bf16_flops_per_second / MEASURED_GPU.bf16_flops_per_second)
    if gpu.bf16_flops_per_second == MEASURED_GPU.bf16_flops_per_second:
        # Slower GPUs are full with smaller micro-batches; how small was not measured, so nothing is taken off for them.
        seconds_per_token += _seconds_per_micro_batch() * (1 / micro_batch_tokens - 1 / MEASURED_MICRO_BATCH_TOKENS)
    rate = 1 / seconds_per_token
    if gpu == MEASURED_GPU and _same_shape(model) and vocab_size == MEASURED_VOCAB_SIZE:
        if _was_measured(precision, seq_len, micro_batch_tokens):
            return Speed(rate, "measured", f"measured on {MEASURED_ON}")
        return Speed(rate, "interpolated", f"interpolated between measurements on {MEASURED_ON}")
    peak = f"{gpu.bf16_flops_per_second / 1e12:g} TFLOP/s of BF16 ({gpu.data_sheet})"
    less = f" x {H100_SHARE:g}" if gpu.key == "h100" else ""
    return Speed(rate, "roofline", f"{peak}{less} x the share of its peak reached at this length on {MEASURED_ON}")


def _measured_flops_per_second(precision: PrecisionConfig, seq_len: int) -> float:
    """Model FLOP/s of the measured runs, linear between the logarithms of their lengths and level outside them."""
    lengths = list(FP8_TOKENS_PER_SECOND)
    reached = [rate * _measured_flops_per_token(length) for length, rate in FP8_TOKENS_PER_SECOND.items()]
    fp8 = float(np.interp(math.log2(seq_len), np.log2(lengths), reached))
    return fp8 if precision.is_fp8 else fp8 * BF16_TOKENS_PER_SECOND / FP8_TOKENS_PER_SECOND[2048]


def _measured_flops_per_token(seq_len: int) -> float:
    return training_flops_per_token(MEASURED_MODEL, MEASURED_VOCAB_SIZE, seq_len)


def _seconds_per_micro_batch() -> float:
    """Time that a micro-batch takes whatever its size, from the two sizes that were measured."""
    slower, faster = 1 / FP8_TOKENS_PER_SECOND_AT_16384, 1 / FP8_TOKENS_PER_SECOND[2048]
    return (slower - faster) / (1 / 16_384 - 1 / MEASURED_MICRO_BATCH_TOKENS)


def _was_measured(precision: PrecisionConfig, seq_len: int, micro_batch_tokens: int) -> bool:
    if precision.name == "bf16":
        return (seq_len, micro_batch_tokens) == (2048, MEASURED_MICRO_BATCH_TOKENS)
    if precision.name != "fp8_hybrid":
        return False
    if micro_batch_tokens == MEASURED_MICRO_BATCH_TOKENS:
        return seq_len in FP8_TOKENS_PER_SECOND
    return (seq_len, micro_batch_tokens) == (2048, 16_384)


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
