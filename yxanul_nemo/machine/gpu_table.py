"""The GPUs that are known, with their makers' figures: for plans, and for the share of the peak that training reaches."""

import re
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A GPU model. Peaks are those of dense matrices, as NVIDIA's data sheets state them."""

    key: str
    """What `plan.gpu` calls it."""
    name: str
    memory_bytes: int
    """What nvidia-smi reports as its total, which is a little less than the name says."""
    bf16_flops_per_second: float
    """BF16 tensor cores, accumulating in FP32."""
    fp32_flops_per_second: float
    """Plain FP32, without TF32."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    reported_as: str
    """Regular expression for the name that nvidia-smi reports."""
    data_sheet: str
    """Where the figures are from."""


GPUS = (
    Gpu(
        key="h100",
        name="H100 SXM 80 GB",
        memory_bytes=81559 * MIB,
        bf16_flops_per_second=989.4e12,
        fp32_flops_per_second=66.9e12,
        capability=(9, 0),
        reported_as=r"H100 80GB HBM3",
        data_sheet="NVIDIA H100 Tensor Core GPU Architecture, white paper",
    ),
    Gpu(
        key="h200",
        name="H200 SXM 141 GB",
        memory_bytes=143771 * MIB,
        bf16_flops_per_second=989.4e12,
        fp32_flops_per_second=66.9e12,
        capability=(9, 0),
        reported_as=r"H200(?! NVL)",
        data_sheet="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    Gpu(
        key="a100",
        name="A100 SXM 80 GB",
        memory_bytes=81920 * MIB,
        bf16_flops_per_second=312e12,
        fp32_flops_per_second=19.5e12,
        capability=(8, 0),
        reported_as=r"A100-SXM4-80GB|A100 80GB PCIe",
        data_sheet="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    Gpu(
        key="rtx_4090",
        name="GeForce RTX 4090 24 GB",
        memory_bytes=24564 * MIB,
        bf16_flops_per_second=165.2e12,
        fp32_flops_per_second=82.6e12,
        capability=(8, 9),
        reported_as=r"RTX 4090(?! D| Laptop)",
        data_sheet="NVIDIA Ada GPU Architecture, white paper",
    ),
    Gpu(
        key="rtx_5090",
        name="GeForce RTX 5090 32 GB",
        memory_bytes=32607 * MIB,
        bf16_flops_per_second=209.5e12,
        fp32_flops_per_second=104.8e12,
        capability=(12, 0),
        reported_as=r"RTX 5090(?! D| Laptop)",
        data_sheet="NVIDIA RTX Blackwell GPU Architecture, white paper",
    ),
)
BY_KEY = {gpu.key: gpu for gpu in GPUS}


def gpu_named(reported: str) -> Gpu | None:
    """The table's entry for a name that nvidia-smi reports."""
    return next((gpu for gpu in GPUS if re.search(gpu.reported_as, reported)), None)
