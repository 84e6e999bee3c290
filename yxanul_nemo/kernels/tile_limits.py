"""What attention by tiles (`causal_attention`) is for. No torch and no Triton, which plans do without."""

BLOCK = 64
"""Tokens of a tile; windows are whole numbers of them."""
SHORTEST_WINDOW = 128
"""At 128 tokens these kernels are as fast as `window_attention` or a little faster (LOG.md); below they would fill half a tile or none."""
LONGEST_WINDOW = 2048
"""Up to here they are faster than cuDNN's, at 4096 slower (LOG.md): the longer a window, the more count the two products that it saves."""
HEAD_DIM = 64
"""Width of a head that their tiles are chosen for."""
CAPABILITY = 9
"""Major compute capability (Hopper) on which they were measured."""


def why_unsupported(is_bf16: bool, seq_len: int, head_dim: int, capability: tuple[int, int]) -> str | None:
    """Why the kernels are not for such queries, or None if they are."""
    if capability[0] != CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, not {CAPABILITY}"
    if not is_bf16:
        return "queries are not in BF16"
    if head_dim != HEAD_DIM:
        return f"the head dimension is {head_dim}, not {HEAD_DIM}"
    if seq_len % BLOCK or not SHORTEST_WINDOW <= seq_len <= LONGEST_WINDOW:
        return f"windows of {seq_len} tokens are not a multiple of {BLOCK} from {SHORTEST_WINDOW} to {LONGEST_WINDOW}"
    return None
