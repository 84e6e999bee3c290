"""The GPUs that a plan knows, with their makers' figures, and the ones found here. Light: nothing here loads a driver."""

import re
import shutil
import subprocess
from dataclasses import dataclass

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.errors import UserError

MIB = 1 << 20
QUERY_SECONDS = 10.0


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


def found_gpus() -> list[str]:
    """Names of this machine's GPUs as nvidia-smi reports them; none where it is absent, fails or does not answer."""
    return _query("name")


def read_power_watts() -> float | None:
    """What the first GPU draws now, by nvidia-smi; None where it does not say."""
    readings = _query("power.draw")
    try:
        return float(readings[0]) if readings else None
    except ValueError:
        return None


def _query(what: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def gpu_named(reported: str) -> Gpu | None:
    """The table's entry for a name that nvidia-smi reports."""
    return next((gpu for gpu in GPUS if re.search(gpu.reported_as, reported)), None)


def choose_gpu(config: RunConfig, found: list[str]) -> tuple[Gpu | None, str]:
    """The GPU to plan for (None: a CPU) and why it is this one, as a sentence's end.

    Args:
        config: `plan.gpu` decides; `auto` is the first of `found`, or a CPU where the run itself would be on one.
        found: names reported by this machine.

    Raises:
        UserError: the GPU found here is not in the table.
    """
    asked = config.plan.gpu
    if asked == "cpu" or (asked == "auto" and config.parallel.device == "cpu"):
        return None, "named by plan.gpu" if asked == "cpu" else "named by parallel.device"
    if asked != "auto":
        return BY_KEY[asked], "named by plan.gpu"
    if found:
        gpu = gpu_named(found[0])
        if gpu is None:
            raise UserError(
                "plan.gpu",
                f"is auto, and the GPU found here, '{found[0]}', has no figures in the table",
                ", ".join(BY_KEY),
                "Name the one that is nearest to it, as in plan.gpu=h100.",
            )
        return gpu, "found here"
    if config.precision.name == "fp32":
        return None, "no GPU was found here"
    return BY_KEY["h100"], "no GPU was found here; another is chosen by plan.gpu"


def check_gpu_precision(precision: PrecisionConfig, gpu: Gpu | None) -> None:
    """Refuse number formats that the GPU (None: a CPU) cannot compute in, as training on it would."""
    where = "precision.name"
    if gpu is None:
        if precision.name != "fp32":
            raise UserError(where, f"is {precision.name} on a CPU", "fp32", "Set precision=fp32, or plan.gpu=h100.")
        return
    if precision.name == "mxfp8" and gpu.capability < (10, 0):
        raise UserError(where, f"is mxfp8 on {gpu.name}", "a Blackwell GPU", "Set precision=fp8_hybrid.")
    if precision.is_fp8 and gpu.capability < (8, 9):
        raise UserError(
            where, f"is {precision.name} on {gpu.name}", "an Ada, Hopper or Blackwell GPU", "Set precision=bf16."
        )
