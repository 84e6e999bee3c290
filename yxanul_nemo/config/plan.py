"""`conf/plan`: the machine that `stage=plan` plans for."""

from typing import Annotated, Literal

from pydantic import Field

from yxanul_nemo.config.base import Section


class PlanConfig(Section):
    """What a forecast needs to know beside the run. It changes nothing in the run."""

    gpu: Literal["auto", "cpu", "h100", "h200", "a100", "rtx_4090", "rtx_5090"] = "auto"
    """GPU to plan for; `auto`: the one found here, a CPU where the run is on one, else an H100."""
    gpus: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """GPUs (on a CPU: processes) of the run; `auto`: as the run itself would choose here."""
    price_per_gpu_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Price of one GPU for one hour, in any currency; the cost is in the same."""
