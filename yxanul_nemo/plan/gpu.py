"""The GPU that a plan is for, found here or named, and the number format that it is expected to train in."""

from yxanul_nemo.config.run import RunConfig, check_fp8_shapes
from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.gpu_table import BY_KEY, Gpu, gpu_named
from yxanul_nemo.machine.number_formats import require_on_cpu, require_on_gpu


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
    if config.precision.name in ("fp32", "auto"):
        return None, "no GPU was found here"
    return BY_KEY["h100"], "no GPU was found here; another is chosen by plan.gpu"


def planned_precision(config: RunConfig, gpu: Gpu | None) -> PrecisionConfig:
    """The configured precision; for `auto`, which training decides by measuring, what it is expected to come to on a GPU (None: a CPU)."""
    if config.precision.name != "auto":
        return config.precision
    if gpu is None:
        return config.precision.named("fp32")
    fp8 = config.precision.named("fp8_hybrid")
    try:
        check_gpu_precision(fp8, gpu)
        check_fp8_shapes(config, fp8)
    except ValueError:
        return config.precision.named("bf16")
    return fp8


def check_gpu_precision(precision: PrecisionConfig, gpu: Gpu | None) -> None:
    """Refuse number formats that the GPU (None: a CPU) cannot compute in, as training on it would."""
    if gpu is None:
        require_on_cpu(precision, way_out="plan.gpu=h100")
    else:
        require_on_gpu(precision, gpu.name, gpu.capability)
