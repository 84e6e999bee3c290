"""The choice of layers, attention and document handling for a GPU, with reasons: the one place that says so. No torch.

Plan, `stage=check`, the model and its training all ask here. What a GPU can compute in is said by `machine.number_formats`.
"""

from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.kernels.attention_limits import LONGEST_SHORT_WINDOW, why_not_short, why_not_tiled

WIDEST_HIDDEN_SIZE = 4096
"""A row of the residual stream is in one tile (`kernels.layer_ops.WIDEST_NORM`)."""
TILES, WINDOW = "tiled kernels", "window kernel"
"""`kernels.causal_attention` and `kernels.window_attention`."""


def why_not_fused(
    model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, capability: tuple[int, int] | None = None
) -> str | None:
    """Return why the layers on a GPU are left to Transformer Engine's modules; None: they are `model.fused_block`.

    Args:
        capability: compute capability of the GPU; None: any on which they were tried.
    """
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
    if capability is not None and capability >= (10, 0):
        # They hand weights to backward products in transposed order alone, which is what Ada and Hopper multiply.
        return f"fused ones were not tried with compute capability {capability[0]}.{capability[1]}"
    return None


def uses_tiles(precision: PrecisionConfig, parallel: ParallelConfig) -> bool:
    """Return whether attention on a GPU is by tiles in the windows that these are for.

    A context-parallel rank's tokens are not neighbours, and FP8 attention is cuDNN's.
    """
    return parallel.tiled_attention and parallel.context_parallel == 1 and not precision.fp8_attention


def attention_kernel(dtype: str, seq_len: int, head_dim: int, tiles_on: tuple[int, int] | None) -> str | None:
    """Return which of the project's kernels attention in windows of this length goes through; None: Transformer Engine's attention.

    Args:
        dtype: of queries, keys and values, as torch names it.
        tiles_on: compute capability of the GPU where attention may go by tiles (`uses_tiles`), else None.
    """
    if tiles_on is not None and why_not_tiled(dtype, seq_len, head_dim, tiles_on) is None:
        return TILES
    return WINDOW if why_not_short(dtype, seq_len, head_dim) is None else None


def attention_of(
    model: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    seq_len: int,
    capability: tuple[int, int],
    dtype: str | None = None,
) -> str | None:
    """Return `attention_kernel` for a configured model on such a GPU.

    Args:
        dtype: None: the one that layers have in this precision.
    """
    if parallel.context_parallel > 1:
        # A rank's tokens are not neighbours.
        return None
    dtype = dtype or ("float32" if precision.name == "fp32" else "bfloat16")
    tiles_on = capability if uses_tiles(precision, parallel) else None
    return attention_kernel(dtype, seq_len, model.head_dim, tiles_on)


def lists_documents(dtype: str, seq_len: int, kernel: str | None) -> bool:
    """Return whether attention is kept inside documents by a list of them (`documents.packed_sequences`), which needs room in a CUDA graph.

    The project's kernels are told the first token that each token sees, and FP32 takes a dense mask. So the list serves BF16 windows of
    more than 128 tokens that tiles are not for: on Ada (with flash-attn) and Blackwell all of them, and on Hopper those above 2048
    tokens, those that are no multiple of 64, heads of another width than 64, and `parallel.tiled_attention=false`.

    Args:
        kernel: what `attention_kernel` says of these windows.
    """
    return dtype == "bfloat16" and seq_len > LONGEST_SHORT_WINDOW and kernel != TILES
