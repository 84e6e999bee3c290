"""Sections `optim`, `precision`, `parallel` and `guards`: how the model is trained."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from yxanul_nemo.config.base import Section

SHORTEST_CONTEXT_CHUNK = 128
"""Tokens. Context-parallel ranks hold two chunks of a window each, and attention goes from chunk to chunk; cuDNN's fails inside a CUDA
graph below this length (illegal memory access; Transformer Engine 2.20, cuDNN 9.14), and there is no other that knows chunks."""

FP8_MULTIPLE = 16
"""Numbers that a row of an FP8 operand is a multiple of, transposed or not: whole 16 bytes (cuBLAS)."""
MXFP8_MULTIPLE = 32
"""Whole blocks of MXFP8 (`MXFP8Quantizer` of Transformer Engine 2.20)."""

NumberFormat = Literal["fp32", "bf16", "fp8_hybrid", "fp8_e4m3", "fp8_current", "mxfp8"]


class MuonConfig(Section):
    """Muon: the layers' matrices are updated by their momentum with all its singular values near 1. Everything else (both factors of the
    embedding, the norms) stays with AdamW.

    An update is scaled so that its numbers are about as large as AdamW's: `lr` and `weight_decay` mean the same for both.
    """

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the average of gradients."""
    nesterov: bool = True
    """Look ahead: the newest gradient counts once more beside the average."""
    neuron_norm: bool = True
    """Divide each row of an update by the root of its mean square over past steps, and leave the matrix as large as it was (NorMuon)."""
    neuron_beta: float = Field(default=0.95, ge=0, lt=1)
    """Decay of these mean squares."""
    cautious_decay: bool = True
    """Decay a weight of these matrices only where the update makes it smaller as well."""
    adamw_lr_factor: float = Field(default=2.0, gt=0)
    """Learning rate of what AdamW updates, as a share of `optim.lr`."""


class OptimConfig(Section):
    """AdamW or Muon, and the learning-rate schedule, a pure function of consumed tokens."""

    lr: float = Field(gt=0)
    """Peak learning rate, before the phase's `lr_scale`."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the decay, as a share of the peak."""
    warmup_tokens: float = Field(default=0, ge=0)
    """Tokens of linear warm-up at the start of the run; below 1 it is a share of the whole run."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; `wsd` stays at the peak and falls linearly over the last `wsd_decay_ratio`."""
    wsd_decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of the run that `wsd` spends falling."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added by AdamW to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms are never decayed."""
    muon: MuonConfig | None = None
    """Muon for the layers' matrices; null: AdamW for everything."""

    @property
    def name(self) -> Literal["adamw", "muon"]:
        """The optimizer's."""
        return "adamw" if self.muon is None else "muon"


class PrecisionConfig(Section):
    """Number formats. Main parameters, gradient accumulation and loss are FP32 in all of them."""

    name: Literal["auto", NumberFormat]
    """`auto`: in each phase the faster one of fp8_hybrid and bf16, as measured; `fp8_hybrid`: E4M3 forward, E5M2 backward, delayed
    scaling; `fp8_e4m3`: E4M3 in both, delayed; `fp8_current`: hybrid formats scaled by the current tensor; `mxfp8`: Blackwell's block
    format."""
    fp8_amax_history_len: int = Field(default=16, ge=1)
    """Steps of largest-value history behind a delayed scale."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """How the history becomes a scale."""
    fp8_attention: bool = False
    """Run the attention core in FP8 too (windows of up to 128 tokens have a kernel of their own, which stays in BF16)."""
    bf16_first_tokens: int = Field(default=0, ge=0)
    """Tokens at the beginning of the run that are trained in BF16, before FP8 takes over."""

    @property
    def is_fp8(self) -> bool:
        """Whether Transformer Engine's FP8 autocast is used."""
        return self.name not in ("auto", "fp32", "bf16")

    @property
    def token_multiple(self) -> int:
        """What the tokens of a micro-batch must be a multiple of: they are the rows of transposed operands."""
        return self.width_multiple

    @property
    def width_multiple(self) -> int:
        """What the width of every matrix in a layer must be a multiple of."""
        return 1 if not self.is_fp8 else MXFP8_MULTIPLE if self.name == "mxfp8" else FP8_MULTIPLE

    def named(self, name: NumberFormat) -> "PrecisionConfig":
        """The same in another format, without what means something in FP8 alone where that is none."""
        changed = self.model_copy(update={"name": name})
        return (
            changed if changed.is_fp8 else changed.model_copy(update={"fp8_attention": False, "bf16_first_tokens": 0})
        )

    @model_validator(mode="after")
    def _fp8_only(self) -> "PrecisionConfig":
        if self.name == "auto":
            return self
        if not self.is_fp8 and self.fp8_attention:
            raise ValueError(f"fp8_attention=true has no meaning with name={self.name}")
        if not self.is_fp8 and self.bf16_first_tokens:
            raise ValueError(f"bf16_first_tokens={self.bf16_first_tokens} has no meaning with name={self.name}")
        return self


class ParallelConfig(Section):
    """Layout over processes. Pipeline parallelism is absent on purpose: both factors of the embedding are tied to the head."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto`: the GPU if there is one."""
    processes_per_node: int | Literal["auto"] = "auto"
    """Training processes here; `auto`: one per GPU, one on a CPU."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share one copy of the matrices; at most `model.kv_groups`."""
    context_parallel: int = Field(default=1, ge=1)
    """Ranks that share one sequence, in two chunks of 128 tokens or more each; needs Transformer Engine."""
    distributed_optimizer: bool | Literal["auto"] = "auto"
    """Each data-parallel rank keeps main parameters and moments of its part of the model only (ZeRO-1); `auto`: where there are several.
    Checkpoints are the same either way."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Largest micro-batch per rank, in tokens; the windows of a step are spread over accumulated micro-batches of at most this size.
    `auto`: what fits into the GPU's memory, at most 65,536; 4,096 on a CPU. Either is halved where memory runs out."""
    layer_spec: Literal["auto", "torch", "te"] = "auto"
    """`te`: Megatron-core's Transformer Engine layers (GPU); `torch`: plain torch layers; `auto`: te where it can run."""
    op_fuser: bool = True
    """Transformer Engine's fused operations for the feed-forward block."""
    fused_layers: bool = True
    """In FP8 with delayed scales, run layers through the project's kernels between matrix products; false: Transformer Engine's modules, as
    everywhere else."""
    tiled_attention: bool = True
    """On Hopper, attention in windows of 128 to 2048 tokens (multiples of 64) by the project's tiles, documents included: faster than
    cuDNN's, which false leaves it to above 128 tokens, and equal bit by bit when repeated."""
    cuda_graph: bool = True
    """Replay forward and backward of a micro-batch as one CUDA graph."""
    deterministic: bool = False
    """Only kernels whose sums have a fixed order, so that a GPU's repeated or resumed run is equal bit by bit; slower where attention is
    cuDNN's. A CPU's always are, and so are the project's own kernels (`tiled_attention`)."""
    cpu_threads: int = Field(default=0, ge=0)
    """Threads per process on a CPU; 0: the cores divided by the processes."""
    nccl_timeout_minutes: float = Field(default=10.0, gt=0)
    """A collective that takes longer ends the run."""

    @property
    def shares_optimizer(self) -> bool:
        """Whether data-parallel ranks share out main parameters and moments, where there are several."""
        return self.distributed_optimizer is not False

    @property
    def fixed_micro_batch_tokens(self) -> int:
        """`micro_batch_tokens` where it is a number: given, or found by `model.memory.with_micro_batch`."""
        assert self.micro_batch_tokens != "auto", "with_micro_batch comes first"
        return self.micro_batch_tokens

    @model_validator(mode="after")
    def _context_needs_te(self) -> "ParallelConfig":
        for key, value in (("device", "cpu"), ("layer_spec", "torch")):
            if self.context_parallel > 1 and getattr(self, key) == value:
                raise ValueError(
                    f"context_parallel={self.context_parallel} with {key}={value}; ranks can share a window only in Transformer Engine's "
                    "attention, on GPUs"
                )
        return self


class GuardsConfig(Section):
    """When an update is skipped and when a run is ended. A loss or gradient norm that is not finite is always skipped."""

    max_skips_in_a_row: int = Field(default=20, ge=1)
    """Updates skipped in a row before the run stops, with a file of the windows and documents they were about."""
    spike_sigma: float | None = Field(default=None, gt=0)
    """Skip an update whose loss or gradient norm is over the mean of the last steps by more than so many standard deviations; unset:
    none. Each phase begins anew, and skips none before half of `spike_window_steps`."""
    spike_window_steps: int = Field(default=128, ge=4)
    """Steps that a spike is compared with."""
    hang_minutes: float | None = Field(default=30.0, gt=0)
    """Minutes without a finished step after which each rank shows its stacks and ends, and training begins again from the newest
    checkpoint, once; unset: never. The first step, with its compilation, counts."""

    @property
    def hang_seconds(self) -> float | None:
        """`hang_minutes` in seconds."""
        return None if self.hang_minutes is None else 60 * self.hang_minutes
