"""Checkpoints without FP8 scales, as imports, other precisions and layers of another kind leave them."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from yxanul_nemo.checkpoint.shards import ShardReader, save_shards
from yxanul_nemo.errors import UserError
from yxanul_nemo.model.fp8_state import without_absent_scales

WEIGHTS = ("model.a", "optimizer.step")
SCALES = ("fp8.forward.0.scale", "fp8.forward.0.amax_history")
OF_FUSED = ("fp8.layers.scale", "fp8.layers.amax", "fp8.layers.amax_history")


def state(*names: str) -> dict[str, ShardedTensor]:
    values = {name: torch.full((3,), float(len(name))) for name in names}
    return {name: ShardedTensor.from_rank_offsets(name, value, replica_id=0) for name, value in values.items()}


@pytest.mark.parametrize(
    ("saved", "wanted", "kept"),
    [
        (WEIGHTS, (*WEIGHTS, *SCALES), WEIGHTS),
        ((*WEIGHTS, *SCALES), (*WEIGHTS, *SCALES), (*WEIGHTS, *SCALES)),
        ((*WEIGHTS, *SCALES), WEIGHTS, WEIGHTS),
        ((*WEIGHTS, *SCALES), (*WEIGHTS, *OF_FUSED), WEIGHTS),
        ((*WEIGHTS, *OF_FUSED), (*WEIGHTS, *SCALES), WEIGHTS),
        ((*WEIGHTS, *OF_FUSED), (*WEIGHTS, *OF_FUSED), (*WEIGHTS, *OF_FUSED)),
    ],
)
def test_scales_are_left_out_only_where_there_are_none(
    tmp_path: Path, saved: tuple[str, ...], wanted: tuple[str, ...], kept: tuple[str, ...]
) -> None:
    save_shards(state(*saved), tmp_path, rank=0)
    reader, target = ShardReader(tmp_path), state(*wanted)
    for shard in target.values():
        shard.data.zero_()
    held = without_absent_scales(target, reader.keys())
    reader.load_into(held)
    assert tuple(held) == kept
    assert all(bool(shard.data.eq(len(name) if name in kept else 0).all()) for name, shard in target.items())


@pytest.mark.parametrize("scales", [SCALES, OF_FUSED])
def test_some_scales_are_no_scales(tmp_path: Path, scales: tuple[str, ...]) -> None:
    save_shards(state(*WEIGHTS, *scales[:-1]), tmp_path, rank=0)
    reader = ShardReader(tmp_path)
    with pytest.raises(UserError, match=f"lacks the tensor '{scales[-1]}'"):
        reader.load_into(without_absent_scales(state(*WEIGHTS, *scales), reader.keys()))


def test_weights_are_never_left_out(tmp_path: Path) -> None:
    save_shards(state("model.a"), tmp_path, rank=0)
    reader = ShardReader(tmp_path)
    with pytest.raises(UserError, match=r"lacks the tensor 'optimizer\.step'"):
        reader.load_into(without_absent_scales(state(*WEIGHTS, *SCALES), reader.keys()))
