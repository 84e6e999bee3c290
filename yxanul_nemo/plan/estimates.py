"""Forecasts of speed: measurements of the 197M model on one H100, carried over to other models and GPUs by FLOPs.

Each forecast says how it was made. One formula serves all cases and returns a measurement exactly where there is one: a token takes its
FLOPs over the FLOP/s that an H100 reaches at this length, and its part of what a micro-batch and a step take whatever their size; other
GPUs are faster or slower as their peaks are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.machine.gpu_table import BY_KEY, Gpu
from yxanul_nemo.model.counts import moment_count, parameter_count, training_flops_per_token
from yxanul_nemo.model.layer_choices import TILES, attention_of, why_not_fused
from yxanul_nemo.model.memory import MEASURED_MODEL, MEASURED_VOCAB_SIZE

MEASURED_ON = "one H100 SXM, 197M model, 2026-11-26"
MEASURED_GPU = BY_KEY["h100"]
FP8_TOKENS_PER_SECOND = {
    8: (65_536, 1, 474.2e3), 16: (65_536, 1, 475.3e3), 32: (65_536, 1, 474.9e3), 64: (65_536, 1, 474.8e3), 128: (65_536, 1, 451.6e3),
    256: (65_536, 1, 443.5e3), 512: (65_536, 1, 430.1e3), 768: (36_864, 2, 400.4e3), 1024: (36_864, 2, 384.8e3), 1536: (36_864, 2, 358.1e3),
    2048: (40_960, 2, 336.3e3),
}  # fmt: skip
"""By sequence length: tokens of a micro-batch, micro-batches of a step, and tokens/s of fp8_hybrid with fused layers, attention by tiles
and CUDA graph."""
SECONDS_PER_MICRO_BATCH, SECONDS_PER_STEP = 4.4e-3, 3.0e-3
"""What a micro-batch takes whatever its size, and a step for its update: they carry the rates above over to other sizes. Fitted to steps of
one and two micro-batches of 16,384 to 65,536 tokens on that H100 (BENCHMARKS.md), which they forecast within 2%."""
MUON_SECONDS_PER_STEP = 6.8e-3
"""What Muon's update of this model takes longer than AdamW's: 6.0 and 7.5 ms in steps of 65,536 tokens at 128 and 2048 tokens, in one run
on an H100 (2026-11-27, BENCHMARKS.md)."""
BF16_SHARE = {128: 345.5 / 437.4, 2048: 277.3 / 331.5}
"""Of FP8's speed, in BF16 with the same micro-batches: both in one run of `benchmarks/peers.py` (2026-11-26)."""
TYPICAL_STEP = 32_768, 2
"""Micro-batch and micro-batches of a step that are assumed where the GPU is another: smaller ones are full with less, and how much was not
measured."""
MODULES_SHARE = 0.945
"""Of the speed of fused layers, with Transformer Engine's modules in FP8: 0.937 to 0.946 at 128, 512 and 2048 tokens (2026-11-26)."""
OTHER_ATTENTION_SHARE = {
    64: 1.0, 128: 444.4 / 450.0, 256: 406.5 / 439.3, 512: 393.7 / 422.5, 1024: 367.3 / 389.0, 2048: 327.4 / 341.3
}  # fmt: skip
"""Of the speed of attention by tiles, with cuDNN's, and at 128 tokens with the kernel for short windows: one H100, pairs of one day
(2026-11-26), BENCHMARKS.md."""
H200_SHARE = 1 / 0.92
"""Of an H100's speed: the H100 had 0.90 to 0.93 of an H200's at the lengths of the h100 curriculum (2026-11-26). Both have the same peak;
the H100's memory is slower."""
FP32_SHARE_OF_PEAK = 0.5
"""Assumed of a GPU in FP32; not measured."""
CPU_FLOPS_PER_SECOND_PER_CORE = 40e9
"""Model FLOP/s of one core in FP32: 67 to 87 GFLOP/s were measured on two cores of an AMD EPYC with the demo, 2026-11-22."""

Basis = Literal["measured", "interpolated", "roofline"]


@dataclass(frozen=True)
class Speed:
    """Forecast of one rank's training speed."""

    tokens_per_second: float
    basis: Basis
    """`measured`: such a run was timed; `interpolated`: between or beside timed ones of this model and GPU; `roofline`: from FLOPs."""
    source: str
    """Where the figure comes from, in words."""


def checkpoint_bytes(model: ModelConfig, vocab_size: int, with_muon: bool) -> int:
    """Size of a checkpoint on disk: main parameters and moments, in FP32."""
    rows = model.padded_vocab_size(vocab_size)
    return 4 * (parameter_count(model, rows) + moment_count(model, rows, with_muon))


def forecast_speed(
    model: ModelConfig,
    vocab_size: int,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    gpu: Gpu | None,
    seq_len: int,
    micro_batch_tokens: int,
    accumulation: int,
    cpu_cores: int = 1,
    muon_share: float = 0.0,
) -> Speed:
    """Training speed of one rank that holds the whole model, in the layers that ranks have with this layout.

    Args:
        gpu: None for a CPU, with `cpu_cores` of them for this rank.
        seq_len: length of the windows, in tokens.
        micro_batch_tokens: tokens of one micro-batch of this rank.
        accumulation: micro-batches of a step.
        muon_share: share of the layers' matrices that this rank updates with Muon; 0: AdamW updates them.
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
    of_peak = gpu.bf16_flops_per_second / MEASURED_GPU.bf16_flops_per_second
    step = (micro_batch_tokens, accumulation) if of_peak == 1 else TYPICAL_STEP
    share = H200_SHARE if gpu.key == "h200" else 1.0
    if precision.is_fp8 and why_not_fused(model, precision, parallel, gpu.capability) is not None:
        share *= MODULES_SHARE
    attention_share = 1.0
    if attention_of(model, precision, parallel, seq_len, gpu.capability) != TILES:
        attention_share = _over_lengths(OTHER_ATTENTION_SHARE, seq_len)
    rate = share * attention_share * of_peak / (flops / _flops_per_second(seq_len) + _fixed_seconds_per_token(*step))
    if not precision.is_fp8:
        rate *= _over_lengths(BF16_SHARE, seq_len)
    if muon_share:
        update_seconds = muon_share * MUON_SECONDS_PER_STEP / of_peak
        rate = 1 / (1 / rate + update_seconds / (micro_batch_tokens * accumulation))
    if (
        gpu == MEASURED_GPU
        and share * attention_share == 1
        and _same_shape(model)
        and vocab_size == MEASURED_VOCAB_SIZE
    ):
        if not muon_share and precision.name == "fp8_hybrid" and FP8_TOKENS_PER_SECOND.get(seq_len, ())[:2] == step:
            return Speed(rate, "measured", f"measured on {MEASURED_ON}")
        return Speed(rate, "interpolated", f"interpolated between measurements on {MEASURED_ON}")
    peak = f"{gpu.bf16_flops_per_second / 1e12:g} TFLOP/s of BF16 ({gpu.data_sheet})"
    times = f" x {share:.3g}" if share != 1 else ""
    reached = f"the share of its peak reached at this length on {MEASURED_ON}"
    without_tiles = ", less what attention by tiles gains" if attention_share != 1 else ""
    return Speed(rate, "roofline", f"{peak}{times} x {reached}{without_tiles}")


def _flops_per_second(seq_len: int) -> float:
    """Model FLOP/s of the measured runs less what does not grow with a micro-batch."""
    reached = {}
    for length, (micro_batch_tokens, accumulation, rate) in FP8_TOKENS_PER_SECOND.items():
        seconds_per_token = 1 / rate - _fixed_seconds_per_token(micro_batch_tokens, accumulation)
        reached[length] = training_flops_per_token(MEASURED_MODEL, MEASURED_VOCAB_SIZE, length) / seconds_per_token
    return _over_lengths(reached, seq_len)


def _over_lengths(by_length: dict[int, float], seq_len: int) -> float:
    """Linear between the logarithms of the lengths and level outside them."""
    return float(np.interp(math.log2(seq_len), np.log2(list(by_length)), list(by_length.values())))


def _fixed_seconds_per_token(micro_batch_tokens: int, accumulation: int) -> float:
    """Of what does not grow with a micro-batch."""
    return (SECONDS_PER_MICRO_BATCH + SECONDS_PER_STEP / accumulation) / micro_batch_tokens


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
