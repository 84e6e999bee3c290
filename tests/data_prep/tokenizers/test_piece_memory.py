"""The memory of pieces beside a dictionary."""

import random
from itertools import pairwise

import numpy as np
import pytest

from data_prep.tokenizers import piece_memory
from data_prep.tokenizers.piece_memory import SHORT_BYTES, PieceMemory, short_keys


def keys_of(pieces: list[bytes]) -> np.ndarray:
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    text = np.frombuffer(b"".join(pieces) + bytes(SHORT_BYTES + 1), dtype=np.uint8)
    return short_keys(text, np.cumsum(sizes) - sizes, sizes)


def random_pieces(generator: random.Random, count: int) -> list[bytes]:
    """Some equal, some alike but for zeros or their end."""
    return [bytes(generator.choices(b"\x00ab", k=generator.randint(1, SHORT_BYTES))) for _ in range(count)]


@pytest.fixture(params=[12, 20])
def memory(request, monkeypatch) -> PieceMemory:
    """Almost full at the end with 2 ** 12 slots, so that pieces are found behind many others."""
    monkeypatch.setattr(piece_memory, "SLOT_BITS", request.param)
    monkeypatch.setattr(piece_memory, "_SLOT_MASK", (1 << request.param) - 1)
    monkeypatch.setattr(piece_memory, "_SHIFT", np.uint64(64 - request.param))
    return PieceMemory()


def test_finds_what_was_added(memory):
    generator = random.Random(0)
    numbers: dict[bytes, int] = {}
    for _ in range(6):
        pieces = random_pieces(generator, 900)
        keys = keys_of(pieces)
        found = memory.find(keys)
        assert found.tolist() == [numbers.get(piece, -1) for piece in pieces]
        new = np.flatnonzero(found < 0)
        given, examples = memory.add(keys[:, new])
        added = [pieces[new[example]] for example in examples]
        assert sorted(added) == sorted({pieces[place] for place in new})
        numbers |= {piece: len(numbers) + i for i, piece in enumerate(added)}
        assert given.tolist() == [numbers[pieces[place]] for place in new]
        assert len(memory) == len(numbers)
        memory.set_ids(np.zeros(len(added), dtype=np.int32), np.ones(len(added), dtype=np.int64))
    memory.clear()
    assert len(memory) == 0
    assert (memory.find(keys_of(list(numbers))) == -1).all()


def test_gives_the_ids_of_each_piece(memory):
    generator = random.Random(1)
    expected: list[list[int]] = []
    for _ in range(3):
        memory.add(keys_of(random_pieces(generator, 400)))
        long = memory.add_long(bytes(generator.choices(b"xyz", k=40)))
        assert long == len(memory) - 1
        fresh = [generator.choices(range(1000), k=generator.randint(1, 20)) for _ in range(len(memory) - len(expected))]
        memory.set_ids(np.concatenate(fresh), np.array([len(ids) for ids in fresh]))
        expected += fresh
    numbers = [generator.randrange(len(expected)) for _ in range(2000)]
    ids, bounds = memory.ids(np.array(numbers))
    assert [ids[a:b].tolist() for a, b in pairwise(bounds)] == [expected[number] for number in numbers]
