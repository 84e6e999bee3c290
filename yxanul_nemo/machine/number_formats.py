"""Which number formats a device can compute in: one answer for the machine at hand and for one that is planned with. No torch."""

from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.errors import UserError

FIRST_WITH_FP8 = (8, 9)
"""Compute capability of Ada."""
FIRST_WITH_MXFP8 = (10, 0)
"""Compute capability of Blackwell."""


def require_on_cpu(precision: PrecisionConfig, way_out: str) -> None:
    """Refuse what a CPU cannot compute in.

    Args:
        way_out: to a GPU.
    """
    if precision.name != "fp32":
        raise UserError("precision.name", f"is {precision.name} on a CPU", "fp32", f"Set precision=fp32, or {way_out}.")


def require_on_gpu(precision: PrecisionConfig, gpu_name: str, capability: tuple[int, int]) -> None:
    """Refuse what a GPU of this compute capability cannot compute in, with the nearest that it can."""
    where, problem = "precision.name", f"is {precision.name} on {gpu_name}"
    if precision.name == "mxfp8" and capability < FIRST_WITH_MXFP8:
        raise UserError(where, problem, "a Blackwell GPU", "Set precision=fp8_hybrid.")
    if precision.is_fp8 and capability < FIRST_WITH_FP8:
        raise UserError(where, problem, "an Ada, Hopper or Blackwell GPU", "Set precision=bf16.")
