"""Whether a model's layers (`model.fused_block`) and attention run through the project's kernels, by configuration alone. No torch."""

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig

WIDEST_HIDDEN_SIZE = 4096
"""A row of the residual stream is in one tile (`kernels.layer_ops.WIDEST_NORM`)."""


def why_not_fused(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig) -> str | None:
    """Why the layers on a GPU are left to Transformer Engine's modules, or None."""
    if not parallel.fused_layers:
        return "parallel.fused_layers=false"
    if parallel.layer_spec == "torch":
        return "parallel.layer_spec=torch"
    if precision.name not in ("fp8_hybrid", "fp8_e4m3"):
        return f"precision {precision.name} is not FP8 with delayed scales"
    if precision.fp8_attention:
        return "precision.fp8_attention=true"
    if parallel.tensor_parallel * parallel.context_parallel > 1:
        return "ranks share a model"
    if model.hidden_size > WIDEST_HIDDEN_SIZE:
        return f"model.hidden_size={model.hidden_size} is above {WIDEST_HIDDEN_SIZE}"
    if model.head_dim & (model.head_dim - 1):
        return f"model.head_dim={model.head_dim} is no power of two"
    return None


def uses_tiles(precision: PrecisionConfig, parallel: ParallelConfig) -> bool:
    """Whether attention on a GPU is by tiles where these are for its windows (`kernels.tile_limits`).

    A context-parallel rank's tokens are not neighbours, and FP8 attention is cuDNN's.
    """
    return parallel.tiled_attention and parallel.context_parallel == 1 and not precision.fp8_attention
