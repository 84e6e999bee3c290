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
    scale_to: Annotated[int, Field(ge=2)] | None = None
    """Also say what the run would do on 1, 2, 4, ... up to this many GPUs, from the speeds of links below; null: not."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of one node."""
    node_gb_per_second: float = Field(default=450.0, gt=0)
    """Link of a GPU to the others of its node, each way. 450: NVLink of H100 and H200 (NVIDIA's data sheets: 900 both ways together);
    A100 300; PCIe 5 x16 64, PCIe 4 x16 32."""
    network_gb_per_second: float = Field(default=50.0, gt=0)
    """Network of a node for each of its GPUs, each way. 50: one 400 Gb/s adapter per GPU, as in a DGX H100 (NVIDIA's user guide)."""
    link_efficiency: float = Field(default=0.56, gt=0, le=1)
    """Share of `node_gb_per_second` that collectives reach: an all-reduce of 100 MB on two H100 (2026-11-25, NCCL without multicast)."""
    network_efficiency: float = Field(default=0.8, gt=0, le=1)
    """Share of `network_gb_per_second` that collectives reach with large messages; assumed."""
    node_latency_microseconds: float = Field(default=4.0, ge=0)
    """A hop inside a node: what NCCL's own tuning takes for NVLink (src/graph/tuning.cc: tree, protocol Simple)."""
    network_latency_microseconds: float = Field(default=14.0, ge=0)
    """A hop between nodes, from the same place."""
    overlap: float = Field(default=0.0, ge=0, le=1)
    """Share of the reduction of gradients that computing hides; 0: all of it comes after a step's last micro-batch, which is what training
    does without `parallel.overlap_gradients`."""
