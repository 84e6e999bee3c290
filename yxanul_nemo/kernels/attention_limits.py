"""Which windows the project's attention kernels are for. No torch and no Triton, which plans do without."""

LONGEST_SHORT_WINDOW = 128
"""Longest window that `window_attention` takes."""
SHORT_HEAD_DIMS = (32, 64, 128)
"""Widths of a head that it takes."""
BLOCK = 64
"""Tokens of a tile of `causal_attention`; windows are whole numbers of them."""
SHORTEST_TILED_WINDOW = 128
"""At 128 tokens these kernels are as fast as `window_attention` or a little faster (LOG.md); below they would fill half a tile or none."""
LONGEST_TILED_WINDOW = 2048
"""Up to here they are faster than cuDNN's, at 4096 slower (LOG.md): the longer a window, the more count the two products that it saves."""
TILED_HEAD_DIM = 64
"""Width of a head that their tiles are chosen for."""
TILED_CAPABILITY = 9
"""Major compute capability (Hopper) on which they were measured."""


def dtype_name(dtype: object) -> str:
    """Return torch's name of one of its number formats, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def why_not_short(dtype: str, seq_len: int, head_dim: int) -> str | None:
    """Return why `window_attention` cannot take windows, or None if it can.

    Args:
        dtype: of queries, keys and values, as torch names it.
    """
    if dtype not in ("bfloat16", "float16"):
        return f"the projection is {dtype}, not bfloat16 or float16"
    if seq_len > LONGEST_SHORT_WINDOW:
        return f"windows of {seq_len} tokens are longer than {LONGEST_SHORT_WINDOW}"
    if head_dim not in SHORT_HEAD_DIMS:
        return f"the head dimension is {head_dim}, not one of {SHORT_HEAD_DIMS}"
    return None


def why_not_tiled(dtype: str, seq_len: int, head_dim: int, capability: tuple[int, int]) -> str | None:
    """Return why `causal_attention` is not for windows, or None if it is; `dtype` as in `why_not_short`."""
    if capability[0] != TILED_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, not {TILED_CAPABILITY}"
    if dtype != "bfloat16":
        return "queries are not in BF16"
    if head_dim != TILED_HEAD_DIM:
        return f"the head dimension is {head_dim}, not {TILED_HEAD_DIM}"
    if seq_len % BLOCK or not SHORTEST_TILED_WINDOW <= seq_len <= LONGEST_TILED_WINDOW:
        return (
            f"windows of {seq_len} tokens are not a multiple of {BLOCK} from {SHORTEST_TILED_WINDOW} to "
            f"{LONGEST_TILED_WINDOW}"
        )
    return None
