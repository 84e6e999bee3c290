"""The .bin/.idx files: the same bytes as Megatron's builder, the same content as its reader, and no harm from damaged files."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus.indexed import IndexedTokens, IndexedWriter, bin_path, idx_path, token_dtype
from yxanul_nemo.errors import UserError


@pytest.fixture(scope="module")
def megatron():
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def documents(dtype, count=57, seed=0):
    rng = np.random.default_rng(seed)
    top = min(np.iinfo(dtype).max, 200_004)
    return [rng.integers(0, top, rng.integers(1, 300), endpoint=True).astype(np.int32) for _ in range(count)]


def write(prefix, docs, dtype):
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for first in range(0, len(docs), 10):
            writer.add_documents(docs[first : first + 10])
    return writer.result


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("count", [1, 57])
def test_bytes_are_those_of_megatrons_builder(tmp_path, megatron, dtype, count):
    docs = documents(dtype, count)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for doc in docs:
        builder.add_document(doc.astype(dtype), [len(doc)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    write(tmp_path / "ours", docs, dtype)

    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_is_written(tmp_path, megatron, dtype):
    docs = documents(dtype)
    write(tmp_path / "ours", docs, dtype)
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == len(docs)
    assert dataset.document_indices.tolist() == list(range(len(docs) + 1))
    for i, doc in enumerate(docs):
        assert dataset[i].dtype == dtype
        np.testing.assert_array_equal(dataset[i], doc)


def test_documents_of_several_sequences_are_read_as_wholes(tmp_path, megatron):
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    expected = []
    for sequences in ([[1, 2, 3], [4]], [[5, 6]], [], [[7], [8, 9], [10]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
        expected.append([token for sequence in sequences for token in sequence])
    builder.finalize(str(tmp_path / "x.idx"))

    read = IndexedTokens(tmp_path / "x")
    assert [read.document(i).tolist() for i in range(len(read))] == expected
    assert read.tokens.tolist() == list(range(1, 11))


def test_type_of_ids_follows_megatrons_rule(megatron):
    for vocab_size in (256, 65_499, 65_500, 65_536, 200_005):
        assert token_dtype(vocab_size) == np.dtype(megatron.DType.optimal_dtype(vocab_size))


def test_result_describes_the_files(tmp_path):
    import hashlib

    docs = documents(np.int32)
    result = write(tmp_path / "x", docs, np.int32)
    assert result.documents == len(docs)
    assert result.tokens == sum(map(len, docs))
    for path, size, digest in (
        (tmp_path / "x.bin", result.bin_bytes, result.bin_sha256),
        (tmp_path / "x.idx", result.idx_bytes, result.idx_sha256),
    ):
        assert path.stat().st_size == size
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_reader_gives_documents_and_offsets(tmp_path):
    docs = documents(np.uint16)
    write(tmp_path / "x", docs, np.uint16)
    read = IndexedTokens(tmp_path / "x")
    assert len(read) == len(docs)
    assert read.dtype == np.uint16
    assert read.document_offsets.dtype == np.int64
    np.testing.assert_array_equal(np.diff(read.document_offsets), [len(doc) for doc in docs])
    for i, doc in enumerate(docs):
        np.testing.assert_array_equal(read.document(i), doc)
    with pytest.raises(IndexError):
        read.document(len(docs))
    with pytest.raises(ValueError, match="read-only"):
        read.tokens[0] = 1


def test_empty_set_is_readable(tmp_path):
    write(tmp_path / "x", [], np.int32)
    read = IndexedTokens(tmp_path / "x")
    assert len(read) == 0
    assert len(read.tokens) == 0


def test_pickle_maps_the_file_again_instead_of_copying(tmp_path):
    write(tmp_path / "x", documents(np.int32), np.int32)
    read = IndexedTokens(tmp_path / "x")
    data = pickle.dumps(read)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).tokens, read.tokens)  # noqa: S301 - made two lines above


@pytest.mark.parametrize("token", [-1, 65_536])
def test_ids_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, token):
    with pytest.raises(OverflowError), IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer:
        writer.add_documents([np.array([1, token, 2])])
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_leaves_the_old_files(tmp_path):
    write(tmp_path / "x", documents(np.int32, seed=1), np.int32)
    before = (tmp_path / "x.bin").read_bytes(), (tmp_path / "x.idx").read_bytes()
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.dtype(np.int32)) as writer:
        writer.add_documents(documents(np.int32, seed=2))
        raise KeyboardInterrupt
    assert ((tmp_path / "x.bin").read_bytes(), (tmp_path / "x.idx").read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2


def header(magic=b"MMIDIDX\x00\x00", version=1, code=4, sequences=2, bounds=3):
    return struct.pack("<9sQBQQ", magic, version, code, sequences, bounds)


def body(lengths=(2, 1), pointers=(0, 8), bounds=(0, 1, 2)):
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(bounds, "<i8"))
    return b"".join(array.tobytes() for array in arrays)


BROKEN = {
    "empty": b"",
    "cut inside the header": header()[:20],
    "foreign": b"PAR1" + bytes(100),
    "version": header(version=2) + body(),
    "float type": header(code=6) + body(),
    "unknown type": header(code=99) + body(),
    "cut inside the lengths": header() + body()[:5],
    "longer than it says": header() + body() + b"x",
    "multimodal": header() + body() + bytes(2),
    "huge count": header(sequences=2**62) + body(),
    "huge bounds": header(bounds=2**63) + body(),
    "no bounds": header(sequences=0, bounds=0),
    "negative length": header() + body(lengths=(-2, 1), pointers=(0, -8)),
    "gap": header() + body(pointers=(0, 12)),
    "overlap": header() + body(pointers=(0, 4)),
    "bounds fall": header() + body(bounds=(0, 3, 2)),
    "bounds stop early": header() + body(bounds=(0, 1, 1)),
    "bounds begin late": header() + body(bounds=(1, 1, 2)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_index_is_named(tmp_path, name):
    bin_path(tmp_path / "x").write_bytes(np.arange(3, dtype=np.int32).tobytes())
    idx_path(tmp_path / "x").write_bytes(BROKEN[name])
    with pytest.raises(UserError, match=r"x\.idx"):
        _ = IndexedTokens(tmp_path / "x").document_offsets


def test_the_unbroken_form_of_these_is_readable(tmp_path):
    bin_path(tmp_path / "x").write_bytes(np.arange(3, dtype=np.int32).tobytes())
    idx_path(tmp_path / "x").write_bytes(header() + body())
    assert IndexedTokens(tmp_path / "x").document(1).tolist() == [2]


@pytest.mark.parametrize("size", [0, 11, 13, 4000])
def test_bin_of_another_size_is_named(tmp_path, size):
    bin_path(tmp_path / "x").write_bytes(bytes(size))
    idx_path(tmp_path / "x").write_bytes(header() + body())
    with pytest.raises(UserError, match=r"x\.bin"):
        IndexedTokens(tmp_path / "x")


@pytest.mark.parametrize("missing", ["x.bin", "x.idx"])
def test_missing_file_is_named(tmp_path, missing):
    write(tmp_path / "x", documents(np.int32, 3), np.int32)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=missing.replace(".", r"\.")):
        IndexedTokens(tmp_path / "x")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("fuzz") / "x"
    docs = documents(np.int32, 5)
    write(prefix, docs, np.int32)
    return prefix, idx_path(prefix).read_bytes(), np.concatenate(docs)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_index_is_refused_or_still_consistent(fuzzed, data):
    prefix, good, tokens = fuzzed
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(raw) - 1)))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "cut":
            del raw[place:]
        elif kind == "insert":
            raw[place:place] = data.draw(st.binary(min_size=1, max_size=16))
        elif raw:
            raw[place] = data.draw(st.integers(0, 255))
    idx_path(prefix).write_bytes(bytes(raw))
    try:
        read = IndexedTokens(prefix)
        assert len(read.tokens) * read.dtype.itemsize == tokens.nbytes
        _ = read.document_offsets
    except UserError:
        return
    assert read.document_offsets[0] == 0
    assert read.document_offsets[-1] * read.dtype.itemsize == tokens.nbytes
    assert (np.diff(read.document_offsets) >= 0).all()


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_refused(fuzzed, raw):
    prefix = fuzzed[0]
    idx_path(prefix).write_bytes(raw)
    with pytest.raises(UserError):
        IndexedTokens(prefix)
