"""Which attention is by tiles."""

import pytest

from yxanul_nemo.kernels.tile_limits import (
    BLOCK,
    CAPABILITY,
    HEAD_DIM,
    LONGEST_WINDOW,
    SHORTEST_WINDOW,
    why_unsupported,
)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"is_bf16": False}, "not in BF16"),
        ({"seq_len": 300}, "300 tokens"),
        ({"seq_len": SHORTEST_WINDOW - BLOCK}, f"{SHORTEST_WINDOW - BLOCK} tokens"),
        ({"seq_len": LONGEST_WINDOW + BLOCK}, f"{LONGEST_WINDOW + BLOCK} tokens"),
        ({"head_dim": 128}, "128"),
        ({"capability": (8, 9)}, "8.9"),
        ({"capability": (12, 0)}, "12.0"),
    ],
)
def test_others_are_left_to_transformer_engine(changed, named):
    fitting = {"is_bf16": True, "seq_len": 256, "head_dim": HEAD_DIM, "capability": (CAPABILITY, 0)}
    assert why_unsupported(**fitting) is None
    assert named in why_unsupported(**fitting | changed)
