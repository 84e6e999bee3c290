"""Which attention is by tiles."""

import pytest

from yxanul_nemo.kernels.attention_limits import (
    BLOCK,
    LONGEST_TILED_WINDOW,
    SHORTEST_TILED_WINDOW,
    TILED_CAPABILITY,
    TILED_HEAD_DIM,
    why_not_tiled,
)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dtype": "float32"}, "not in BF16"),
        ({"seq_len": 300}, "300 tokens"),
        ({"seq_len": SHORTEST_TILED_WINDOW - BLOCK}, f"{SHORTEST_TILED_WINDOW - BLOCK} tokens"),
        ({"seq_len": LONGEST_TILED_WINDOW + BLOCK}, f"{LONGEST_TILED_WINDOW + BLOCK} tokens"),
        ({"head_dim": 128}, "128"),
        ({"capability": (8, 9)}, "8.9"),
        ({"capability": (12, 0)}, "12.0"),
    ],
)
def test_others_are_left_to_transformer_engine(changed, named):
    fitting = {"dtype": "bfloat16", "seq_len": 256, "head_dim": TILED_HEAD_DIM, "capability": (TILED_CAPABILITY, 0)}
    assert why_not_tiled(**fitting) is None
    assert named in why_not_tiled(**fitting | changed)
