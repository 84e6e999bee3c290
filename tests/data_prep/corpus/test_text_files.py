"""JSON lines and plain text: the same documents as from parquet, what is left out is counted, what is wrong is named by its line."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import text_files
from data_prep.corpus.find_shards import resolve_shards
from data_prep.corpus.open_shard import open_shard
from data_prep.corpus.text_files import LONGEST_DOCUMENT_BYTES
from yxanul_nemo.errors import UserError

REPOSITORY = Path(__file__).parents[3]
ROWS = ["one", None, "größer, 你好\nand a line", "", '"quoted" \\ {"text": 1}', "x" * 5000, "  "]


def read(path, **options):
    """Texts (or ids), rows, and rows skipped (null, empty, not UTF-8), of all shards behind a path."""
    texts, rows, skipped = [], 0, [0, 0, 0]
    for shard in resolve_shards(str(path), "k"):
        with open_shard(shard, **options) as reader:
            for batch in reader.batches():
                assert [text.encode() for text in batch.texts] == batch.raw_texts
                texts += batch.texts + [ids.tolist() for ids in batch.ids]
                rows += batch.rows
                for i, count in enumerate((batch.skipped.null, batch.skipped.empty, batch.skipped.not_utf8)):
                    skipped[i] += count
    return texts, rows, skipped


def pack(path, content):
    """Write bytes as the end of the path's name says; gzip in two members, as appended files are."""
    if path.suffix == ".gz":
        half = len(content) // 2
        path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    else:
        path.write_bytes(content)
    return path


def lines(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.ndjson", "X.JSON", "x.json.gz"])
@pytest.mark.parametrize("block_bytes", [7, 1 << 20])
def test_json_lines_give_what_parquet_gives(tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(text_files, "BATCH_BYTES", block_bytes)
    pq.write_table(pa.table({"text": ROWS, "n": range(len(ROWS))}), tmp_path / "x.parquet")
    content = lines({"n": n, "text": text} for n, text in enumerate(ROWS)).replace(b"\n", b"\r\n\n")
    path = pack(tmp_path / name, b"\xef\xbb\xbf" + content.removesuffix(b"\r\n\n"))
    assert read(path) == read(tmp_path / "x.parquet") == ([t for t in ROWS if t], 7, [1, 1, 0])


def test_ids_in_json_lines_give_what_parquet_gives(tmp_path):
    rows = [[1, 2, 3], [], None, [70000]]
    pq.write_table(pa.table({"ids": rows}), tmp_path / "x.parquet")
    path = pack(tmp_path / "x.jsonl.zst", lines({"ids": row} for row in rows))
    assert read(path, ids_column="ids") == read(tmp_path / "x.parquet", ids_column="ids")
    for wrong in ([1, "2"], [1.5], [True], "12", [2**40]):
        path.with_suffix("").write_bytes(lines([{"ids": [1]}, {"ids": wrong}]))
        with pytest.raises(UserError, match=r"x\.jsonl line 2: has no token ids in 'ids'"):
            read(path.with_suffix(""), ids_column="ids")


def test_what_is_no_text_in_json_lines_is_counted(tmp_path):
    content = b'{"text": "a"}\n{"text": "\xe9"}\n{"other": 1}\n{"text": "\\ud800"}\n{"text": "b"}'
    assert read(pack(tmp_path / "x.jsonl", content)) == (["a", "b"], 5, [1, 0, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"\n', r"x\.jsonl line 3: is no JSON"),
        (b'{"text": "a"}\n["b"]\n', r"x\.jsonl line 2: holds a JSON list; expected one JSON object per line"),
        (b'{"text": "a"}\n{"text": 5}\n', r"x\.jsonl line 2: has a JSON int in 'text'; expected text"),
        (
            b'{"content": "a", "n": 1}\n',
            r"x\.jsonl line 1: has no key 'text' \(it has: content, n\).*one of: content\.",
        ),
        (b'{"text": "a", "text": "b"}\n', r"x\.jsonl line 1: is no JSON \(the key 'text' is there twice\)"),
        (b'[{"text": "a"}]', r"x\.jsonl line 1: holds a JSON list"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(pack(tmp_path / "x.jsonl", content))


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MOST_LINE_BYTES", 3 << 20)
    path = pack(tmp_path / "x.jsonl", lines([{"text": "a"}, {"text": "b" * (5 << 20)}]))
    with pytest.raises(UserError, match=r"x\.jsonl line 2: has more than 3,145,728 bytes"):
        read(path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz"])
def test_a_packed_file_that_is_cut_short_or_is_not_packed_is_named(tmp_path, name):
    whole = pack(tmp_path / name, lines({"text": f"{i} {'word ' * 50}"} for i in range(20_000))).read_bytes()
    for content in (whole[: len(whole) // 2], b'{"text": "a"}\n' * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.txt.gz", "x.md.zst"])
def test_a_short_text_file_is_one_document(tmp_path, name):
    assert read(pack(tmp_path / name, b"\xef\xbb\xbfone\n\ntwo\r\n")) == (["one\n\ntwo\r\n"], 1, [0, 0, 0])


def test_files_without_text_or_of_another_encoding_are_counted(tmp_path):
    for name, content in (("a", b""), ("b", "café".encode("latin-1")), ("c", b"text"), ("d", b"\xef\xbb\xbf")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert read(tmp_path) == (["text"], 4, [0, 2, 1])


@settings(deadline=None, max_examples=40)
@given(
    pieces=st.lists(st.sampled_from(["word ", "größer", "你好", "😀", "\n", "\n\n", "\r\n\r\n", "x" * 700]), min_size=1)
)
@pytest.mark.parametrize("name", ["x.txt", "x.txt.zst"])
def test_documents_of_a_long_file_are_all_of_it_in_order(tmp_path_factory, name, pieces):
    text = "".join(pieces) * (60_000 // len("".join(pieces).encode()) + 1)
    folder = tmp_path_factory.mktemp("long")
    texts, rows, skipped = read(pack(folder / name, text.encode()))
    assert "".join(texts) == text
    assert (rows, skipped) == (len(texts), [0, 0, 0])
    assert all(len(part.encode()) <= LONGEST_DOCUMENT_BYTES for part in texts)


def test_a_long_file_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f"{i} {'word ' * (i % 90)}\n\n" for i in range(1000)]
    texts, _, _ = read(pack(tmp_path / "x.md", "".join(paragraphs).encode()))
    assert len(texts) > 5
    assert all(text.endswith("\n\n") for text in texts)


def test_token_ids_cannot_come_from_plain_text(tmp_path):
    with pytest.raises(UserError, match="is plain text, without a column 'ids'"):
        read(pack(tmp_path / "x.txt", b"a"), ids_column="ids")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.txt", "x.md.gz"])
def test_estimates_of_rows_and_bytes_are_near(tmp_path, name):
    rng = random.Random(0)
    rows = [{"n": i, "text": " ".join(f"{rng.random()}" for _ in range(i % 60))} for i in range(9000)]
    content = lines(rows) if "jsonl" in name else "\n".join(row["text"] for row in rows).encode()
    path = pack(tmp_path / name, content)
    texts, count, _ = read(path)
    (shard,) = resolve_shards(str(path), "k")
    with open_shard(shard) as reader:
        assert reader.column_bytes == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.2)
        assert reader.rows == pytest.approx(count, rel=0.35)


# From files to tokens


def test_a_folder_of_text_is_prepared_repeated_and_guarded_like_shards(tmp_path, prepare, make_texts, tree):
    folder = tmp_path / "in"
    folder.mkdir()
    texts = make_texts(300, seed=1)
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.{'md' if i % 2 else 'txt'}").write_text(text)
    (folder / "empty.txt").touch()
    out = tmp_path / "out"
    manifest = prepare(out, folder)
    (entry,) = manifest.sources["web"].inputs
    assert (entry.rows, entry.skipped_empty, entry.bytes) == (301, 1, sum(len(text.encode()) for text in texts))
    assert manifest.sources["web"].documents("train") + manifest.sources["web"].documents("heldout") == 300
    before = tree(out)
    assert prepare(out, folder) == manifest
    (out / "web" / "train" / "texts-00000.bin").unlink()
    prepare(out, folder)
    assert tree(out) == before
    (folder / "000.txt").write_text(texts[0][::-1])
    with pytest.raises(UserError, match=r"000\.txt to empty\.txt: has changed since it was prepared: SHA-256"):
        prepare(out, folder)
    (folder / "000.txt").write_text(texts[0])
    (folder / "new.txt").write_text("more")
    with pytest.raises(UserError, match=r"to new\.txt: has changed since it was prepared: .* bytes then"):
        prepare(out, folder)


def test_tokens_do_not_depend_on_the_format(tmp_path, prepare, make_texts, write_shards):
    texts = make_texts(400, seed=3)
    pack(tmp_path / "part.jsonl.gz", lines({"text": text} for text in texts))
    from_lines = prepare(tmp_path / "a", tmp_path / "part.jsonl.gz", workers=2, process_min_bytes=0)
    from_parquet = prepare(tmp_path / "b", write_shards(tmp_path / "in", {"part": texts}))
    assert from_lines.fingerprint == from_parquet.fingerprint


def test_a_damaged_file_leaves_the_others_finished(tmp_path, prepare, make_texts):
    (tmp_path / "in").mkdir()
    for seed in range(3):
        pack(tmp_path / "in" / f"{seed}.jsonl", lines({"text": text} for text in make_texts(50, seed)))
    with (tmp_path / "in" / "1.jsonl").open("ab") as file:
        file.write(b'{"text": ')
    with pytest.raises(
        UserError, match=r"1 of 3 shards could not be prepared; 2 are finished and kept[^$]*1\.jsonl line 51"
    ):
        prepare(tmp_path / "out", tmp_path / "in")
    assert len(list((tmp_path / "out").glob("web/records/*.json"))) == 2


@pytest.mark.parametrize("name", ["big.jsonl", "big.txt"])
def test_memory_does_not_grow_with_a_file(tmp_path, name):
    """200 MB of text in one file, in a process of its own: peak memory above the start stays below a fifth of it."""
    text = "some words of a line\n" * 1000
    line = json.dumps({"text": text}) + "\n" if name.endswith("jsonl") else text + "\n"
    with open(tmp_path / name, "w") as file:
        for _ in range(10_000):
            file.write(line)
    program = f"""
from pathlib import Path
from data_prep.corpus.find_shards import resolve_shards
from data_prep.corpus.open_shard import open_shard

def peak_kib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

(shard,) = resolve_shards({str(tmp_path / name)!r}, "k")
before = peak_kib()
with open_shard(shard) as reader:
    size = sum(len(text) for batch in reader.batches() for text in batch.texts)
print(size, (peak_kib() - before) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=100
    )
    size, peak = map(int, done.stdout.split())
    assert size >= 200_000_000
    assert peak < size / 5
