"""Files of tensors that are damaged, hostile or of another model: an error of ours, and nothing else. Torch is imported in children.

Stands for CVE-2025-23264, -23265, CVE-2026-24150 to -24152 (Megatron-LM checkpoints) and CVE-2025-32434 (torch.load): a pickle
in the place of tensors is refused without being read.
"""

import json
import pickle
import random
import struct
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from yxanul_nemo.errors import UserError

ROWS, COLUMNS = 6, 8


class Exploit:
    """Its pickle, once read, leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def setup_ranks() -> None:
    from yxanul_nemo.config.training import ParallelConfig
    from yxanul_nemo.machine.runtime import init_process_groups

    init_process_groups(ParallelConfig(device="cpu"), "cpu", 0)


def sharded(fill: float, part_rows: int = ROWS, name: str = "w") -> dict:
    """Two tensors, the first one in blocks of rows."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    count = ROWS // part_rows
    blocks = {
        f"{name}{i}": ShardedTensor.from_rank_offsets(
            name, torch.full((part_rows, COLUMNS), fill) + i, (0, i, count), replica_id=0
        )
        for i in range(count)
    }
    return blocks | {"step": ShardedTensor.from_rank_offsets("step", torch.full((1,), fill), replica_id=0)}


def saved(folder: Path) -> bytes:
    from yxanul_nemo.checkpoint.shards import save_shards

    setup_ranks()
    save_shards(sharded(1.0, part_rows=2), folder, 0)
    return (folder / "rank_00000.safetensors").read_bytes()


def load(folder: Path) -> str:
    """The user's error of loading into one whole tensor, or nothing; any other exception fails the test."""
    from yxanul_nemo.checkpoint.shards import ShardReader

    try:
        ShardReader(folder).load_into(sharded(0.0))
    except UserError as error:
        return str(error)
    return ""


def loads(folder: Path, contents: list[bytes]) -> list[str]:
    setup_ranks()
    errors = []
    for content in contents:
        (folder / "rank_00000.safetensors").write_bytes(content)
        errors.append(load(folder))
    return errors


def with_header(content: bytes, change: dict, metadata: dict | None = None) -> bytes:
    """The same data under another header: entries are replaced, or taken out by None."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size]) | change
    pieces = json.loads(header["__metadata__"]["pieces"])
    header["__metadata__"] = {"pieces": json.dumps(pieces | (metadata or {}))}
    raw = json.dumps({name: entry for name, entry in header.items() if entry is not None}).encode()
    return struct.pack("<Q", len(raw)) + raw + content[8 + size :]


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    good = run_ranks(saved, 1, tmp_path)[0]
    marker = tmp_path / "owned"
    entry = {"dtype": "F32", "shape": [2, COLUMNS], "data_offsets": [0, 64]}
    whole = {"global_shape": [ROWS, COLUMNS]}
    cases = {
        b"": "is not a checkpoint file",
        good[:4]: "is not a checkpoint file",
        good[:-1]: "is not a checkpoint file",
        good + b"\0": "is not a checkpoint file",
        pickle.dumps(Exploit(marker)): "is not a checkpoint file",
        b"PK\x03\x04" + pickle.dumps(Exploit(marker)): "is not a checkpoint file",
        struct.pack("<Q", 1 << 62) + good[8:]: "is not a checkpoint file",
        with_header(good, {"w@0,0": entry | {"data_offsets": [0, 1 << 40]}}): "is not a checkpoint file",
        with_header(good, {"w@0,0": entry | {"shape": [1 << 40, 1 << 40]}}): "is not a checkpoint file",
        with_header(good, {"w@0,0": entry | {"dtype": "PICKLE"}}): "is not a checkpoint file",
        with_header(good, {}, {"absent@0": {"offset": [0], "global_shape": [1]}}): "is not a checkpoint file",
        with_header(good, {}, {"w@0,0": 7}): "is not a checkpoint file",
        with_header(good, {}, {"w@0,0": {"offset": "ab", **whole}}): "is not a checkpoint file",
        with_header(good, {}, {"w@0,0": {"offset": [0], **whole}}): "is not a checkpoint file",
        with_header(good, {}, {"w@0,0": {"offset": [-4, 0], **whole}}): "is not a checkpoint file",
        with_header(good, {}, {"w@0,0": {"offset": [4, 0], **whole}}): "is there twice",
        with_header(good, {}, {"w@0,0": {"offset": [0, 0], "global_shape": [7, 8]}}): "has 'w' as [7, 8]",
    }
    errors = run_ranks(loads, 1, tmp_path, [good, *cases])[0]
    assert errors[0] == ""
    for error, expected in zip(errors[1:], cases.values(), strict=True):
        assert expected in error, (expected, error)
    assert not marker.exists()


def test_any_changed_bytes_are_refused_or_read_as_numbers(tmp_path: Path) -> None:
    good, draw = run_ranks(saved, 1, tmp_path)[0], random.Random(3)
    contents = []
    for _ in range(400):
        raw = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(raw))
            kind = draw.randrange(3)
            if kind == 0:
                raw[place] ^= 1 << draw.randrange(8)
            elif kind == 1:
                raw[place:place] = draw.randbytes(draw.randint(1, 9))
            else:
                del raw[place : place + draw.randint(1, 9)]
        contents.append(bytes(raw))
    errors = run_ranks(loads, 1, tmp_path, contents)[0]
    assert sum(map(bool, errors)) > 100


@pytest.mark.parametrize("part_bytes", [1, 100, 128, 1 << 20])
def test_pieces_are_spread_over_files_and_come_back(tmp_path: Path, part_bytes: int) -> None:
    files, equal = run_ranks(save_in_parts, 1, tmp_path, part_bytes)[0]
    # Three blocks of 64 bytes and one number, which takes 64 too.
    assert files == {1: 4, 100: 4, 128: 2, 1 << 20: 1}[part_bytes]
    assert equal


def save_in_parts(folder: Path, part_bytes: int) -> tuple[int, bool]:
    """Number of files, and whether what is loaded is what was there when the snapshot was taken."""
    import torch

    from yxanul_nemo.checkpoint import snapshot
    from yxanul_nemo.checkpoint.shards import ShardReader

    setup_ranks()
    snapshot.PART_BYTES = part_bytes
    state = sharded(1.0, part_rows=2)
    buffers = snapshot.HostSnapshot(state)
    for fill in (5.0, 3.0):
        for shard in state.values():
            shard.data.fill_(fill)
        buffers.take(state)
    for shard in state.values():
        shard.data.fill_(9.0)
    buffers.write(folder, 0)
    names = sorted(file.name for file in folder.glob("rank_00000*.safetensors"))
    # Another state finds other buffers.
    other = sharded(4.0, part_rows=3, name="v")
    buffers.take(other)
    (folder / "other").mkdir()
    buffers.write(folder / "other", 0)
    ShardReader(folder / "other").load_into(sharded(0.0, name="v"))
    loaded = sharded(0.0)
    ShardReader(folder).load_into(loaded)
    same = all(torch.equal(shard.data, torch.full_like(shard.data, 3.0)) for shard in loaded.values())
    return len(names), same
