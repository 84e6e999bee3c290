"""Forecasts of speed: measurements of the 197M model on one H100, carried over to other models and GPUs by FLOPs.

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
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.model.fused_layers import why_not_fused
from yxanul_nemo.model.memory import MEASURED_MODEL, MEASURED_VOCAB_SIZE

MEASURED_ON = "one H100 SXM, 197M model, 2026-11-26"
MEASURED_GPU = BY_KEY["h100"]
MEASURED_MICRO_BATCH_TOKENS = 32_768

FP8_TOKENS_PER_SECOND = {8: 454.7e3, 128: 431.2e3, 256: 395.0e3, 512: 382.1e3, 1024: 355.2e3, 2048: 317.1e3}
"""By sequence length: fp8_hybrid, micro-batches of 32,768 tokens, fused layers, CUDA graph."""
FP8_TOKENS_PER_SECOND_AT_16384 = 304.7e3
"""The same at 2048 with micro-batches of 16,384 tokens."""
BF16_TOKENS_PER_SECOND_AT_16384 = 258.4e3
"""That in BF16."""
MODULES_SHARE = 0.945
"""Of the speed of fused layers, with Transformer Engine's modules in FP8: 0.937 to 0.946 at 128, 512 and 2048 tokens (2026-11-26)."""
H200_SHARE = 1 / 0.92
"""Of an H100's speed: the H100 had 0.90 to 0.93 of an H200's at the lengths of the h100 curriculum (2026-11-26). Both have the same peak;
the H100's memory is slower."""
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
    parallel: ParallelConfig,
    gpu: Gpu | None,
    seq_len: int,
    micro_batch_tokens: int,
    cpu_cores: int = 1,
) -> Speed:
    """Training speed of one rank that holds the whole model, in the layers that ranks have with this layout.

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
    is_fused = why_not_fused(model, precision, parallel) is None
    share = H200_SHARE if gpu.key == "h200" else 1.0
    if precision.is_fp8 and not is_fused:
        share *= MODULES_SHARE
    seconds_per_token = flops / (reached * share * gpu.bf16_flops_per_second / MEASURED_GPU.bf16_flops_per_second)
    if gpu.bf16_flops_per_second == MEASURED_GPU.bf16_flops_per_second:
        # Slower GPUs are full with smaller micro-batches; how small was not measured, so nothing is taken off for them.
        seconds_per_token += _seconds_per_micro_batch() * (1 / micro_batch_tokens - 1 / MEASURED_MICRO_BATCH_TOKENS)
    rate = 1 / seconds_per_token
    if gpu == MEASURED_GPU and share == 1 and _same_shape(model) and vocab_size == MEASURED_VOCAB_SIZE:
        if _was_measured(precision, seq_len, micro_batch_tokens):
            return Speed(rate, "measured", f"measured on {MEASURED_ON}")
        return Speed(rate, "interpolated", f"interpolated between measurements on {MEASURED_ON}")
    peak = f"{gpu.bf16_flops_per_second / 1e12:g} TFLOP/s of BF16 ({gpu.data_sheet})"
    times = f" x {share:.3g}" if share != 1 else ""
    return Speed(rate, "roofline", f"{peak}{times} x the share of its peak reached at this length on {MEASURED_ON}")


def _measured_flops_per_second(precision: PrecisionConfig, seq_len: int) -> float:
    """Model FLOP/s of the measured runs, linear between the logarithms of their lengths and level outside them."""
    lengths = list(FP8_TOKENS_PER_SECOND)
    reached = [rate * _measured_flops_per_token(length) for length, rate in FP8_TOKENS_PER_SECOND.items()]
    fp8 = float(np.interp(math.log2(seq_len), np.log2(lengths), reached))
    if precision.is_fp8:
        return fp8
    # What a micro-batch takes whatever its size is taken as FP8's.
    more = 1 / BF16_TOKENS_PER_SECOND_AT_16384 - 1 / FP8_TOKENS_PER_SECOND_AT_16384
    return fp8 / (1 + more * FP8_TOKENS_PER_SECOND[2048])


def _measured_flops_per_token(seq_len: int) -> float:
    return training_flops_per_token(MEASURED_MODEL, MEASURED_VOCAB_SIZE, seq_len)


def _seconds_per_micro_batch() -> float:
    """Time that a micro-batch takes whatever its size, from the two sizes that were measured."""
    slower, faster = 1 / FP8_TOKENS_PER_SECOND_AT_16384, 1 / FP8_TOKENS_PER_SECOND[2048]
    return (slower - faster) / (1 / 16_384 - 1 / MEASURED_MICRO_BATCH_TOKENS)


def _was_measured(precision: PrecisionConfig, seq_len: int, micro_batch_tokens: int) -> bool:
    if precision.name == "bf16":
        return (seq_len, micro_batch_tokens) == (2048, 16_384)
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
