"""Parquet shards as streams of documents: what is found, what is counted, what is refused, and how much memory it takes."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus.shards import ShardReader
from yxanul_nemo.errors import UserError

REPOSITORY = Path(__file__).parents[3]
TEXTS = [f"document {i} says: größer, 你好 {'x' * (i % 40)}" for i in range(500)]


def write(path, column, name="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column}), path, **options)
    return path


def read(path, **options):
    """All documents of a shard, the number of its rows and the rows skipped (null, empty, not UTF-8)."""
    texts, ids, rows, skipped = [], [], 0, [0, 0, 0]
    with ShardReader(path, **options) as reader:
        for batch in reader.batches():
            assert [text.encode() for text in batch.texts] == batch.raw_texts
            texts += batch.texts
            ids += [array.tolist() for array in batch.ids]
            rows += batch.rows
            for i, count in enumerate((batch.skipped.null, batch.skipped.empty, batch.skipped.not_utf8)):
                skipped[i] += count
    return texts or ids, rows, skipped


# Reading text


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
        pa.string_view(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_every_kind_of_text_column_gives_the_same_documents(tmp_path, kind, compression):
    if pa.types.is_dictionary(kind):
        column = pa.array(TEXTS).dictionary_encode()
    else:
        column = pa.array([text.encode() for text in TEXTS], pa.binary()).cast(kind)
    path = write(tmp_path / "x.parquet", column, compression=compression, row_group_size=77)
    assert read(path) == (TEXTS, len(TEXTS), [0, 0, 0])


def test_null_empty_and_broken_rows_are_counted_and_left_out(tmp_path):
    rows = [b"good", None, b"", b"\xff\xfe", b"", b"half \xe4\xbd", b"\xed\xa0\x80", "größer".encode(), b"a\x00b"]
    column = pa.array(rows, pa.binary()).view(pa.string())
    path = write(tmp_path / "x.parquet", column)
    assert read(path) == (["good", "größer", "a\x00b"], 9, [1, 2, 3])


def test_other_columns_do_not_matter(tmp_path):
    table = pa.table(
        {
            "meta": pa.array([{"text": "inner"}, None, {"text": "z"}]),
            "body": ["one", "two", "three"],
            "n": [1, 2, 3],
            "text": ["a", None, "c"],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", text_column="body")[0] == ["one", "two", "three"]
    assert read(tmp_path / "x.parquet")[0] == ["a", "c"]


def test_a_dot_in_the_name_of_a_column_is_a_dot(tmp_path):
    path = write(tmp_path / "x.parquet", ["one", "two"], name="page.text")
    assert read(path, text_column="page.text")[0] == ["one", "two"]


def test_a_shard_without_rows_gives_nothing(tmp_path):
    path = write(tmp_path / "x.parquet", pa.array([], pa.string()))
    assert read(path) == ([], 0, [0, 0, 0])


# Reading ids


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int32()),
        pa.list_(pa.uint16()),
        pa.large_list(pa.int64()),
        pa.list_(pa.int64(), 3),
        pa.list_view(pa.int32()),
        pa.large_list_view(pa.int64()),
    ],
    ids=str,
)
def test_lists_of_ids_are_read_whatever_their_type(tmp_path, kind):
    path = write(tmp_path / "x.parquet", pa.array([[1, 2, 3], [4, 5, 6], None], kind), name="input_ids")
    assert read(path, ids_column="input_ids") == ([[1, 2, 3], [4, 5, 6]], 3, [1, 0, 0])


def test_empty_lists_are_counted(tmp_path):
    path = write(tmp_path / "x.parquet", pa.array([[1], [], None, [2]]), name="ids")
    assert read(path, ids_column="ids") == ([[1], [2]], 4, [1, 1, 0])


def test_a_null_inside_a_list_is_refused(tmp_path):
    path = write(tmp_path / "x.parquet", pa.array([[1, None, 2]]), name="ids")
    with pytest.raises(UserError, match=r"x\.parquet.*null"):
        read(path, ids_column="ids")


def test_columns_of_nulls_alone_are_rows_without_documents(tmp_path):
    """Arrow gives such a shard's column the type `null`, or `list<null>` where lists are empty."""
    path = write(tmp_path / "text.parquet", pa.array([None] * 3))
    assert read(path) == ([], 3, [3, 0, 0])
    path = write(tmp_path / "ids.parquet", pa.array([None, [], None], pa.list_(pa.null())), name="ids")
    assert read(path, ids_column="ids") == ([], 3, [2, 1, 0])


# Refusing


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "Git-LFS pointer",
            "git lfs pull",
        ),
        (b'{"text": "a"}\n{"text": "b"}\n', "JSON lines", "name end in .jsonl"),
        (b'\xef\xbb\xbf\n {"text": "a"}\n', "JSON lines", "name end in .jsonl"),
        (b'[{"text": "a"}]', "JSON", "a line each"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page", "Download it again"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip", "Unpack"),
    ],
)
def test_what_is_taken_for_parquet_is_called_by_its_name(tmp_path, content, what, fix):
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.parquet.*{what}") as error:
        ShardReader(path)
    assert fix in error.value.fix


def test_an_absent_column_is_answered_with_those_that_fit(tmp_path):
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: has no column 'text' \(it has: content, n\).*one of: content\."):
        ShardReader(tmp_path / "x.parquet")


@pytest.mark.parametrize(("options", "wanted"), [({}, "string"), ({"ids_column": "text"}, "list<int>")])
def test_a_column_of_another_type_is_named(tmp_path, options, wanted):
    path = write(tmp_path / "x.parquet", pa.array([1.5, 2.5]))
    with pytest.raises(UserError, match=rf"column 'text' is of type double; expected {wanted}"):
        ShardReader(path, **options)


def broken_files(good: bytes):
    yield "empty", b""
    yield "text", b"text\nhello\n" * 50
    yield "only the magic", b"PAR1PAR1"
    yield "cut in half", good[: len(good) // 2]
    yield "without its end", good[:-4]
    yield "without its beginning", good[1000:]
    yield "zeros", bytes(len(good))
    yield "footer overwritten", good[:-200] + bytes(150) + good[-50:]
    yield "data overwritten", good[:300] + bytes(3000) + good[3300:]
    yield "footer length beyond the file", good[:-8] + b"\xff\xff\xff\x7fPAR1"


@pytest.mark.parametrize("number", range(10))
def test_a_broken_file_is_named(tmp_path, number):
    rng = np.random.default_rng(0)
    texts = [rng.integers(32, 127, 40).astype(np.uint8).tobytes().decode() for _ in range(500)]
    good = write(tmp_path / "good.parquet", texts, compression="zstd", use_dictionary=False).read_bytes()
    assert len(good) > 10_000
    name, data = list(broken_files(good))[number]
    path = tmp_path / "bad.parquet"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.parquet.*parquet"):
        print(name, read(path)[1:])


def test_changed_text_is_found_where_the_file_has_checksums(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, ["sum: 1000 euro"] * 3, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"1000", b"9000"))
    with pytest.raises(UserError, match=r"x\.parquet"):
        read(path)


# Memory


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """A row group of 400 MB of text, in a process of its own: peak memory above the start stays below a fifth of it."""
    rng = np.random.default_rng(0)
    block = rng.integers(97, 123, 2_000_000).astype(np.uint8).tobytes().decode()
    schema = pa.schema([("text", pa.string())])
    path = tmp_path / "big.parquet"
    with pq.ParquetWriter(path, schema, compression="snappy", use_dictionary=False) as writer:
        texts = [block[i : i + 2000] for i in range(0, 2_000_000, 2000)] * 200
        writer.write_table(pa.table([pa.array(texts)], schema=schema), row_group_size=len(texts))
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    program = f"""
import sys
from pathlib import Path
from data_prep.corpus.shards import ShardReader

def peak_kib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

before = peak_kib()
with ShardReader(Path({str(path)!r})) as reader:
    size = sum(len(text) for batch in reader.batches() for text in batch.texts)
print(size, (peak_kib() - before) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=100
    )
    size, peak = map(int, done.stdout.split())
    assert size == 400_000_000
    assert peak < size / 5
