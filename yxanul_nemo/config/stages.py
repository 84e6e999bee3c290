"""Sections `plan`, `bench`, `report`, `generate`, `evaluate` and `publish`, of stages that change nothing in a run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from yxanul_nemo.config.base import PathValue, Section
from yxanul_nemo.config.training import NumberFormat


class PlanConfig(Section):
    """What a forecast needs to know beside the run. It changes nothing in the run."""

    gpu: Literal["auto", "cpu", "h100", "h200", "a100", "rtx_4090", "rtx_5090"] = "auto"
    """GPU to plan for; `auto`: the one found here, a CPU where the run is on one, else an H100."""
    gpus: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """GPUs (on a CPU: processes) of the run; `auto`: as the run itself would choose here."""
    price_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU for one hour, in any currency; the cost is in the same."""
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
    """Share of `network_gb_per_second` that collectives reach with large messages; assumed. Yours is the bus bandwidth that
    nccl-tests reports over the speed of the link."""
    node_latency_microseconds: float = Field(default=4.0, ge=0)
    """A hop inside a node: what NCCL's own tuning takes for NVLink (src/graph/tuning.cc: tree, protocol Simple)."""
    network_latency_microseconds: float = Field(default=14.0, ge=0)
    """A hop between nodes, from the same place."""


class BenchConfig(Section):
    """Cases of the benchmark. It changes nothing in the run; lists are tried in every combination."""

    seq_len: list[int] | None = Field(default=None, min_length=1)
    """Window lengths in tokens, as in `[8,2048]`; unset: each phase of the curriculum with its own `tokens_per_step`."""
    precision: list[NumberFormat] | None = Field(default=None, min_length=1)
    """Number formats, as in `[bf16,fp8_hybrid]`; unset: the recipe's, which for `precision=auto` are all that it chooses from."""
    micro_batch_tokens: list[int] | None = Field(default=None, min_length=1)
    """Largest micro-batches in tokens; unset: the recipe's."""
    tokens_per_step: int | None = Field(default=None, ge=1)
    """Tokens of one optimizer step where `seq_len` is set; unset: two micro-batches for each data-parallel rank."""
    steps: int = Field(default=20, ge=2)
    """Steps that are timed for each case."""
    warmup_steps: int = Field(default=4, ge=1)
    """Steps before them, in which kernels are compiled and the CUDA graph is captured."""
    profile: bool = False
    """Also list the GPU's kernels by their share of a step."""


class SweepConfig(Section):
    """`-m`: a grid of runs. It changes nothing in a run."""

    at_once: int | None = Field(default=None, ge=1)
    """Runs at work at once; unset: one on each GPU, on a CPU one for every `parallel.cpu_threads` cores (two where that is 0)."""


class ReportConfig(Section):
    """The page about a run. It changes nothing in the run."""

    dir: PathValue | None = None
    """Folder for the page and its charts; unset: `run.dir/report`, for a comparison a folder beside the first run."""
    prompts: list[str] = Field(default=["", "The "])
    """Beginnings that the model of each phase's end continues; an empty one lets it begin by itself, an empty list makes no samples."""
    sample_tokens: int = Field(default=80, ge=1)
    """Most tokens of one sample."""
    temperature: float = Field(default=0.8, ge=0)
    """Of sampling; 0 takes the most likely token each time."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where samples are made; a GPU may be at work for the run itself."""


class GenerateConfig(Section):
    """`stage=generate`: how `prompt` is continued."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens to write; fewer if the document or the model's context ends."""
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the most likely token each time; 1 samples from the model's own probabilities."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample only among the most likely tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample only among so many most likely tokens; 0: all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the logits of tokens that stand in the text already, as in transformers; 1: off."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """The text ends before the first of these, as in `['\\n']`."""
    prompts: PathValue | None = None
    """Text file with one prompt in each line, instead of `prompt`; texts come as JSON lines with the keys prompt, text, tokens."""
    batch: int = Field(default=64, ge=1)
    """Prompts of the file that are continued at once."""
    seed: int = 0
    """The same seed gives the same text on the same machine."""
    checkpoint: Literal["best", "latest"] = "best"
    """Which checkpoint of a run; best: the newest where none is marked."""


class EvaluateConfig(Section):
    """`stage=evaluate`: what a model is tried at, through lm-evaluation-harness (needs `uv sync --inexact --extra eval`)."""

    tasks: list[str] = Field(default=["choice", "cloze"], min_length=1)
    """`choice`, `cloze`: questions made of the validation domains' text; `gsm8k`, `humaneval`: from local files; `small`: HellaSwag, ARC,
    PIQA, WinoGrande and LAMBADA; or any of the harness's names. `small` and the harness's own tasks fetch their data."""
    tasks_folder: PathValue | None = None
    """Folder with tasks of one's own for the harness (YAML)."""
    items_per_domain: int = Field(default=200, ge=1)
    """Most questions that choice and cloze make of one domain."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many questions of each task; unset: all."""
    gsm8k_path: PathValue = Path("gsm8k_validation.parquet")
    """File with the columns question and answer, or its name in `validation.dir`."""
    humaneval_path: PathValue = Path("humaneval_validation.parquet")
    """File with the columns prompt, test and entry_point, or its name in `validation.dir`."""
    run_generated_code: bool = False
    """Let the harness run what the model wrote, as humaneval needs. It runs with this user's rights and is kept from nothing: use a
    container without network and without data (docs/evaluation.md)."""
    seed: int = 0
    """Of the questions that choice and cloze make."""

    @model_validator(mode="after")
    def _code_may_run(self) -> "EvaluateConfig":
        if "humaneval" in self.tasks and not self.run_generated_code:
            raise ValueError(
                "tasks has humaneval, which runs what the model wrote; allow it with run_generated_code=true"
            )
        return self


class PublishConfig(Section):
    """`stage=publish`: an export with its model card, to the Hugging Face hub. It changes nothing in the run."""

    repo: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """OWNER/NAME of the model on the hub; it is made where it does not exist."""
    revision: str = Field(default="main", pattern=r"^[A-Za-z0-9][\w./-]*$")
    """Branch that the export is put on, as in `phase-2`; it is made from `main` where it does not exist."""
    private: bool = False
    """Make a new repository that only its owner can see; one that exists stays as it is."""
    dry_run: bool = False
    """Show the card and the files, and publish nothing; needs neither network nor token."""
