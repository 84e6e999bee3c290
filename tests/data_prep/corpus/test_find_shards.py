"""Which files are behind a source's path: all that it means are taken, or named with the reason why not."""

import os
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus import find_shards as find_shards_module
from data_prep.corpus.find_shards import find_shards, resolve_shards
from data_prep.corpus.formats import Format
from yxanul_nemo.errors import UserError


def write(path, column, name="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: column}), path)
    return path


def test_folder_glob_and_file_give_sorted_shards(tmp_path):
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", ".hidden.parquet", "_SUCCESS.parquet", "notes.txt"):
        write(tmp_path / name, ["x"])
    assert [shard.stem for shard in resolve_shards(str(tmp_path), "k")] == ["a", "b"]
    assert [shard.stem for shard in resolve_shards(f"{tmp_path}/b*", "k")] == ["b"]
    assert [shard.stem for shard in resolve_shards(f"{tmp_path}/**/*.parquet", "k")] == ["a", "b", "sub--c"]
    assert [shard.paths[0] for shard in resolve_shards(f"{tmp_path}/a.parquet", "k")] == [tmp_path / "a.parquet"]


def test_equal_names_in_two_folders_keep_apart(tmp_path):
    write(tmp_path / "2024" / "x.parquet", ["x"])
    write(tmp_path / "2025" / "x.parquet", ["y"])
    assert [shard.stem for shard in resolve_shards(f"{tmp_path}/*/x.parquet", "k")] == ["2024--x", "2025--x"]


def test_a_clash_of_output_names_is_refused(tmp_path):
    write(tmp_path / "a" / "b.parquet", ["x"])
    write(tmp_path / "a--b.parquet", ["y"])
    with pytest.raises(UserError, match="both be written as a--b"):
        resolve_shards(f"{tmp_path}/**/*.parquet", "k")


@pytest.mark.parametrize("pattern", ["", "none", "none/*.parquet", "*.parq", "a**b/*.parquet", "data/train.parquets"])
def test_nothing_found_names_the_key(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"^data\.sources\.web\.path: "):
        resolve_shards(pattern, "data.sources.web.path")


def test_a_misspelt_file_is_answered_with_the_nearest(tmp_path):
    write(tmp_path / "train.parquet", ["x"])
    with pytest.raises(UserError, match=r"Did you mean 'train\.parquet'"):
        resolve_shards(f"{tmp_path}/trian.parquet", "k")


def test_a_folder_of_folders_is_answered_with_the_glob(tmp_path):
    write(tmp_path / "sub" / "x.parquet", ["x"])
    with pytest.raises(UserError, match=r"\*\*/\*\.parquet") as error:
        resolve_shards(str(tmp_path), "k")
    assert resolve_shards(error.value.fix.split("'")[1], "k")


def test_a_link_to_nothing_is_named_and_a_link_to_a_file_is_taken(tmp_path):
    """A hub's cache is links into a folder of blobs, which may have been cleaned."""
    write(tmp_path / "blobs" / "one", ["x"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").symlink_to("../blobs/one")
    assert [shard.stem for shard in resolve_shards(str(tmp_path / "in"), "k")] == ["a"]
    (tmp_path / "in" / "b.parquet").symlink_to("../blobs/two")
    for pattern in (tmp_path / "in", tmp_path / "in" / "*.parquet", tmp_path / "**" / "*.parquet"):
        with pytest.raises(UserError, match=r"^k: .*b\.parquet is a link to \.\./blobs/two, which does not exist"):
            resolve_shards(str(pattern), "k")


def test_linked_folders_are_gone_through(tmp_path):
    write(tmp_path / "elsewhere" / "x.parquet", ["x"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [shard.stem for shard in resolve_shards(f"{tmp_path}/in/**/*.parquet", "k")] == ["linked--x"]


def test_folders_named_like_files_are_taken_with_what_is_in_them(tmp_path):
    """Spark writes one file for each of its parts into a folder with the file's name."""
    for name in ("a.parquet", "b.parquet/part-0.parquet", "b.parquet/part-1.parquet", "b.parquet/_SUCCESS"):
        write(tmp_path / name, ["x"])
    expected = ["a", "b.parquet--part-0", "b.parquet--part-1"]
    assert [shard.stem for shard in resolve_shards(str(tmp_path), "k")] == expected
    assert [shard.stem for shard in resolve_shards(f"{tmp_path}/*.parquet", "k")] == expected
    (tmp_path / "c.parquet").mkdir()
    with pytest.raises(UserError, match=r"c\.parquet is a folder without parquet files"):
        resolve_shards(str(tmp_path), "k")


def test_endings_in_capitals_count(tmp_path):
    write(tmp_path / "A.PARQUET", ["x"])
    write(tmp_path / "b.Parquet", ["x"])
    assert [shard.stem for shard in resolve_shards(str(tmp_path), "k")] == ["A", "b"]


def test_what_is_left_out_is_named(tmp_path):
    for name in ("a.parquet", "more/b.parquet", "empty/notes.pdf", "c.parq", ".hidden", "_SUCCESS"):
        write(tmp_path / name, ["x"])
    found = find_shards(str(tmp_path), "k")
    assert [shard.stem for shard in found.shards] == ["a"]
    assert found.left_out == [
        "c.parq (its name has no ending of a format that is read)",
        "empty/ (a folder)",
        "more/ (a folder with files of text)",
    ]


def test_pipes_and_names_that_are_no_text_are_refused(tmp_path):
    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        resolve_shards(str(tmp_path), "k")
    (tmp_path / "x.parquet").unlink()
    (tmp_path / os.fsdecode(b"caf\xe9.parquet")).write_bytes(b"")
    with pytest.raises(UserError, match="is not UTF-8"):
        resolve_shards(str(tmp_path), "k")


@pytest.mark.parametrize("folder", ["v[2]", "a b[x]", "it's", "what?"])
def test_the_advice_for_a_folder_of_folders_works_as_a_shell_reads_it(tmp_path, folder):
    write(tmp_path / folder / "sub" / "x.parquet", ["x"])
    with pytest.raises(UserError) as error:
        resolve_shards(str(tmp_path / folder), "k")
    _, advised = shlex.split(error.value.fix.partition("use ")[2].rstrip("."))[0].split("=", 1)
    assert [shard.paths[0].name for shard in resolve_shards(advised, "k")] == ["x.parquet"]


def test_brackets_in_a_folder_that_is_there_are_explained(tmp_path):
    write(tmp_path / "v[2]" / "x.parquet", ["x"])
    with pytest.raises(UserError, match="a choice of letters") as error:
        resolve_shards(f"{tmp_path}/v[2]/*.parquet", "k")
    _, advised = shlex.split(error.value.fix.partition("use ")[2].rstrip("."))[0].split("=", 1)
    assert [shard.paths[0].name for shard in resolve_shards(advised, "k")] == ["x.parquet"]


def test_deep_partitions_get_short_names_and_keep_apart(tmp_path):
    deep = "/".join(f"column_number_{i}=some_long_value_ü_{i}" for i in range(12))
    for part in ("0", "1"):
        write(tmp_path / deep / f"part-{part}.parquet", ["x"])
    shards = resolve_shards(f"{tmp_path}/**/*.parquet", "k")
    assert [shard.name for shard in shards] == [f"{deep}/part-{part}.parquet" for part in "01"]
    assert len({shard.stem for shard in shards}) == 2
    for shard in shards:
        # As the files are named while they are written.
        (tmp_path / f".{shard.stem}.json.12345678.tmp").touch()
        assert shard.stem == resolve_shards(f"{tmp_path}/**/*.parquet", "k")[shards.index(shard)].stem


def test_other_formats_are_answered_with_what_to_do(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"has files of \.zip.*Unpack"):
        resolve_shards(str(tmp_path), "k")


def test_of_several_formats_the_one_with_the_most_bytes_is_read_and_the_others_are_named(tmp_path):
    """Data sets have a README beside their shards, and folders of text a list of what they are."""
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "part-0.jsonl.gz").write_bytes(bytes(100))
    (tmp_path / "part-1.jsonl").write_bytes(bytes(100))
    found = find_shards(str(tmp_path), "k")
    assert [(shard.name, shard.kind) for shard in found.shards] == [
        ("part-0.jsonl.gz", Format.JSON_LINES),
        ("part-1.jsonl", Format.JSON_LINES),
    ]
    assert found.left_out == ["README.md (beside files of JSON lines)"]
    (tmp_path / "book.txt").write_bytes(bytes(1000))
    (only,) = resolve_shards(str(tmp_path), "k")
    assert [path.name for path in only.paths] == ["README.md", "book.txt"]


def test_text_files_are_joined_in_their_order_up_to_a_size_and_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(find_shards_module, "MOST_TEXT_BYTES", 100)
    monkeypatch.setattr(find_shards_module, "MOST_TEXT_FILES", 3)
    for name, size in zip("abcdefgh", (10, 20, 30, 10, 95, 10, 300, 1), strict=True):
        (tmp_path / f"{name}.txt").write_bytes(bytes(size))
    groups = {shard.stem: "".join(path.stem for path in shard.paths) for shard in resolve_shards(str(tmp_path), "k")}
    assert list(groups.values()) == ["abc", "d", "e", "f", "g", "h"]
    assert list(groups) == [f"texts-{number:05d}" for number in range(6)]


def test_the_name_of_a_data_set_on_the_hub_is_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf download --repo-type dataset HuggingFaceFW/fineweb-edu"):
        resolve_shards("HuggingFaceFW/fineweb-edu", "k")
