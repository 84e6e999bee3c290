"""Preparation as a whole: what is written, that nothing is lost when it is killed, and that changes and damage are refused."""

import errno
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import encode
from data_prep.corpus import prepare_corpus
from data_prep.indexed import IndexedTokens
from data_prep.manifest import load_manifest
from data_prep.prepare import main, run_data_stage, training_texts
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.errors import UserError

REPOSITORY = Path(__file__).parents[2]
WORDS = [
    "the",
    "quick",
    "brown fox",
    "jumps",
    "over",
    "dog and then",
    "größer",
    "你好",
    "12345",
    "<|endoftext|>",
    "\n\n",
]


def make_texts(count, seed, words=40):
    rng = random.Random(seed)
    return [f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, words))) for i in range(count)]


def write_shards(folder, shards, name="text"):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, column in shards.items():
        pq.write_table(pa.table({name: column}), folder / f"{stem}.parquet", row_group_size=100)
    return folder


@pytest.fixture
def corpus(tmp_path):
    """Three shards; the texts of each by its name."""
    shards = {f"shard-{i}": make_texts(200 + 50 * i, seed=i) for i in range(3)}
    return write_shards(tmp_path / "in", shards), shards


@pytest.fixture
def prepare(tokenizer_folder):
    load = functools.partial(Tokenizer.load, tokenizer_folder)

    def run(data_dir, folder, heldout_fraction=0.1, workers=1, **options):
        ids_column = options.pop("ids_column", None)
        sources = {"web": SourceConfig(path=str(folder), ids_column=ids_column)}
        return prepare_corpus(data_dir, sources, load(), load, heldout_fraction, workers, **options)

    return run


def tree(folder):
    """Every file below a folder and its bytes; locks left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def decoded(data_dir, manifest, split, tokenizer):
    """Text of every document of a split; each ends with EOS, which is nowhere else."""
    texts = []
    for prefix in manifest.prefixes(data_dir, "web", split):
        read = IndexedTokens(prefix)
        for i in range(len(read)):
            ids = read.document(i)
            assert ids[-1] == tokenizer.eos_id
            assert tokenizer.eos_id not in ids[:-1]
            texts.append(tokenizer.decode(ids[:-1]))
    return texts


# What is written


def test_every_document_is_in_one_split_in_the_order_of_its_shard(tmp_path, corpus, prepare, tokenizer_folder):
    folder, shards = corpus
    manifest = prepare(tmp_path / "out", folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    train = decoded(tmp_path / "out", manifest, "train", tokenizer)
    heldout = decoded(tmp_path / "out", manifest, "heldout", tokenizer)
    everything = [text for texts in shards.values() for text in texts]
    assert train == [text for text in everything if text in set(train)]
    assert heldout == [text for text in everything if text in set(heldout)]
    assert sorted(train + heldout) == sorted(everything)
    assert set(train).isdisjoint(heldout)
    assert 0.05 < len(heldout) / len(everything) < 0.15


def test_counts_are_those_of_the_files(tmp_path, corpus, prepare, tokenizer_folder):
    folder, shards = corpus
    manifest = prepare(tmp_path / "out", folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    source = manifest.sources["web"]
    assert [entry.rows for entry in source.inputs] == [len(texts) for texts in shards.values()]
    for split in ("train", "heldout"):
        texts = decoded(tmp_path / "out", manifest, split, tokenizer)
        assert source.documents(split) == len(texts)
        assert source.text_bytes(split) == sum(len(text.encode()) for text in texts)
        assert source.tokens(split) == sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    assert manifest.verify(tmp_path / "out") == 2 * 6
    assert manifest.vocab_size == tokenizer.vocab_size
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint


def test_bytes_are_those_of_megatrons_builder_over_the_same_documents(tmp_path, corpus, prepare, tokenizer_folder):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder, shards = corpus
    manifest = prepare(tmp_path / "out", folder, heldout_fraction=0)
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert manifest.sources["web"].heldout == []
    for (stem, texts), prefix in zip(shards.items(), manifest.prefixes(tmp_path / "out", "web", "train"), strict=True):
        theirs = IndexedDatasetBuilder(str(tmp_path / f"{stem}.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for text in texts:
            ids = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
            theirs.add_document(ids, [len(ids)])
        theirs.finalize(str(tmp_path / f"{stem}.idx"))
        for ending in (".bin", ".idx"):
            assert Path(f"{prefix}{ending}").read_bytes() == (tmp_path / f"{stem}{ending}").read_bytes()


def test_output_does_not_depend_on_processes_chunks_or_order_of_work(tmp_path, corpus, prepare, monkeypatch):
    folder, _ = corpus
    prepare(tmp_path / "one", folder, workers=1)
    # Two shards go to one worker each, the third to both.
    monkeypatch.setattr("data_prep.pool.PIECE_CHARS", 1000)
    prepare(tmp_path / "two", folder, workers=2, process_min_bytes=0)
    monkeypatch.setattr("data_prep.pool.prepare_shard", lambda *arguments: encode.prepare_shard(*arguments[:3], 500))
    prepare(tmp_path / "small", folder, workers=1)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "small")


def test_split_of_a_document_depends_on_its_text_alone(tmp_path, corpus, prepare, tokenizer_folder):
    folder, shards = corpus
    everything = [text for texts in shards.values() for text in texts]
    random.Random(5).shuffle(everything)
    other = write_shards(tmp_path / "other", {"all": everything})
    tokenizer = Tokenizer.load(tokenizer_folder)
    first = prepare(tmp_path / "a", folder)
    second = prepare(tmp_path / "b", other)
    heldout = decoded(tmp_path / "a", first, "heldout", tokenizer)
    assert sorted(heldout) == sorted(decoded(tmp_path / "b", second, "heldout", tokenizer))
    more = prepare(tmp_path / "c", folder, heldout_fraction=0.2)
    assert set(heldout) < set(decoded(tmp_path / "c", more, "heldout", tokenizer))


def test_ids_are_taken_over_and_give_the_same_corpus_as_their_text(tmp_path, corpus, prepare, tokenizer_folder):
    folder, shards = corpus
    tokenizer = Tokenizer.load(tokenizer_folder)
    columns = {}
    for number, (stem, texts) in enumerate(shards.items()):
        # EOS already there or not: the documents end with one.
        end = [tokenizer.eos_id] if number else []
        columns[stem] = pa.array([[*ids.tolist(), *end] for ids in tokenizer.encode_batch(texts)], pa.list_(pa.int32()))
    ids_folder = write_shards(tmp_path / "ids", columns, name="input_ids")
    text = prepare(tmp_path / "a", folder, heldout_fraction=0)
    ids = prepare(tmp_path / "b", ids_folder, heldout_fraction=0, ids_column="input_ids")
    assert ids.sources["web"].train == text.sources["web"].train
    assert ids.fingerprint == text.fingerprint


@pytest.mark.parametrize("wrong", [-1, 300, 2**40])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, prepare, wrong):
    folder = write_shards(tmp_path / "in", {"x": pa.array([[1, 2], [3, wrong]])}, name="ids")
    with pytest.raises(
        UserError, match=rf"x\.parquet: column 'ids' has token id {wrong}; expected ids from 0 to 2\d\d,"
    ):
        prepare(tmp_path / "out", folder, ids_column="ids")
    assert list((tmp_path / "out").rglob("*.bin")) == []


def test_skipped_rows_are_counted_in_the_manifest(tmp_path, prepare):
    column = pa.array([b"good one", None, b"", b"\xff", b"good two"], pa.binary()).view(pa.string())
    folder = write_shards(tmp_path / "in", {"x": column})
    manifest = prepare(tmp_path / "out", folder, heldout_fraction=0)
    entry = manifest.sources["web"].inputs[0]
    assert (entry.rows, entry.skipped_null, entry.skipped_empty, entry.skipped_not_utf8) == (5, 1, 1, 1)
    assert manifest.sources["web"].documents("train") == 2


def test_a_source_without_documents_is_refused(tmp_path, prepare):
    folder = write_shards(tmp_path / "in", {"x": pa.array(["", None])})
    with pytest.raises(UserError, match=r"data\.sources\.web: has no document to train on"):
        prepare(tmp_path / "out", folder)


def test_a_long_document_is_one_document(tmp_path, prepare, tokenizer_folder):
    text = "the quick brown fox " * 200_000 + "9" * 100_000
    folder = write_shards(tmp_path / "in", {"x": ["short", text]})
    manifest = prepare(tmp_path / "out", folder, heldout_fraction=0)
    read = IndexedTokens(manifest.prefixes(tmp_path / "out", "web", "train")[0])
    assert len(read) == 2
    assert Tokenizer.load(tokenizer_folder).decode(read.document(1)[:-1]) == text


# Repeating, resuming, being killed


def test_repeating_writes_nothing(tmp_path, corpus, prepare):
    folder, _ = corpus
    first = prepare(tmp_path / "out", folder)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert prepare(tmp_path / "out", folder) == first
    assert {path: path.stat().st_mtime_ns for path in times if path.name != ".lock"} == {
        path: mtime for path, mtime in times.items() if path.name != ".lock"
    }


def test_only_what_is_missing_is_made_again(tmp_path, corpus, prepare, monkeypatch):
    folder, _ = corpus
    out = tmp_path / "out"
    prepare(out, folder)
    before = tree(out)
    (out / "web/train/shard-1.bin").unlink()
    (out / "web/heldout/shard-2.idx").write_bytes(b"cut short")
    (out / "manifest.json").unlink()
    done = []
    original = encode.prepare_shard
    monkeypatch.setattr(
        "data_prep.pool.prepare_shard", lambda task, *rest: done.append(task.shard.stem) or original(task, *rest)
    )
    prepare(out, folder)
    assert sorted(done) == ["shard-1", "shard-2"]
    assert tree(out) == before


PROGRAM = """
import functools, sys
from pathlib import Path
from data_prep.corpus import prepare_corpus
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.load import compose, parse

if __name__ == "__main__":
    out, folder, tokenizer, workers = sys.argv[1:]
    load = functools.partial(Tokenizer.load, Path(tokenizer))
    print("ready", flush=True)
    prepare_corpus(Path(out), {"web": SourceConfig(path=folder)}, load(), load, 0.1, int(workers), process_min_bytes=0)
"""


@pytest.mark.parametrize(("workers", "kills"), [(1, 4), (2, 2)])
def test_killed_at_random_moments_it_ends_the_same(tmp_path, prepare, tokenizer_folder, workers, kills):
    """SIGKILL after so many finished shards and a random time more; finished shards are never made again."""
    folder = write_shards(tmp_path / "in", {f"s{i}": make_texts(800, seed=i, words=100) for i in range(5)})
    prepare(tmp_path / "whole", folder)
    (tmp_path / "program.py").write_text(PROGRAM)
    out = tmp_path / "killed"
    rng = random.Random(workers)

    def start():
        return subprocess.Popen(
            [sys.executable, tmp_path / "program.py", out, folder, tokenizer_folder, str(workers)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def records():
        return {path: path.stat().st_mtime_ns for path in out.glob("web/records/s*.json")}

    finished: dict[Path, int] = {}
    for kill in range(kills):
        process = start()
        assert process.stdout.readline() == b"ready\n"
        while len(records()) < kill and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers_left = [Path("/proc", pid) for pid in children.read_text().split()] if children.exists() else []
        process.kill()
        errors = process.communicate()[1].decode()
        deadline = time.monotonic() + 30
        while any(path.exists() for path in workers_left):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.02)
        assert process.returncode in (0, -signal.SIGKILL), errors
        assert finished.items() <= records().items(), "a finished shard was made again"
        finished = records()
    process = start()
    errors = process.communicate()[1].decode()
    assert process.returncode == 0, errors
    assert finished.items() <= records().items()
    assert tree(out) == tree(tmp_path / "whole")


def _ending_process_after(calls, original):
    left = iter(range(calls))
    return lambda *arguments: original(*arguments) if next(left, None) is not None else os._exit(9)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_ended_at_each_step_towards_the_disk_it_ends_the_same(tmp_path, prepare, monkeypatch, call):
    """A child process ends without warning at the n-th rename or fsync, for every n; then the work is taken up again."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    folder = write_shards(tmp_path / "in", {"a": make_texts(30, seed=1), "b": make_texts(30, seed=2)})
    prepare(tmp_path / "whole", folder)
    original = getattr(os, call)
    for last in range(100):
        out = tmp_path / f"out-{last}"
        child = os.fork()
        if child == 0:
            setattr(os, call, _ending_process_after(last, original))
            prepare(out, folder)
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert exit_code in (0, 9)
        prepare(out, folder)
        assert tree(out) == tree(tmp_path / "whole")
        if exit_code == 0:
            break
    assert last > 2 * 5, "two shards take five files each"


def test_a_killed_worker_is_reported_and_its_shard_done_next_time(tmp_path, corpus, tokenizer_folder, prepare):
    folder, _ = corpus

    load = functools.partial(_load_and_die, tokenizer_folder)
    with pytest.raises(RuntimeError, match="killed by SIGKILL"):
        prepare_corpus(
            tmp_path / "out",
            {"web": SourceConfig(path=str(folder))},
            Tokenizer.load(tokenizer_folder),
            load,
            0.1,
            2,
            process_min_bytes=0,
        )
    assert prepare(tmp_path / "out", folder) == prepare(tmp_path / "other", folder)


def _load_and_die(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def test_two_processes_do_not_prepare_one_folder(tmp_path, corpus, prepare):
    folder, _ = corpus
    prepare(tmp_path / "out", folder)
    with open(tmp_path / "out" / ".lock") as handle:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            prepare(tmp_path / "out", folder)
    prepare(tmp_path / "out", folder)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "with space"])
def test_a_source_name_that_is_no_folder_name_is_refused(tmp_path, corpus, tokenizer_folder, name):
    load = functools.partial(Tokenizer.load, tokenizer_folder)
    with pytest.raises(UserError, match="is not a name"):
        prepare_corpus(tmp_path / "out", {name: SourceConfig(path=str(corpus[0]))}, load(), load, 0.1, 1)


# Changes


def test_a_changed_option_is_refused_by_name(tmp_path, corpus, prepare):
    folder, _ = corpus
    prepare(tmp_path / "out", folder)
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"heldout_fraction 0\.1 then, 0\.2 now"):
        prepare(tmp_path / "out", folder, heldout_fraction=0.2)
    assert tree(tmp_path / "out") == before


def test_another_tokenizer_is_refused(tmp_path, corpus, prepare, tokenizer_folder):
    folder, _ = corpus
    prepare(tmp_path / "out", folder)
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, other)
    definition = (other / "tokenizer.json").read_text().replace('"add_prefix_space": false', '"add_prefix_space": true')
    (other / "tokenizer.json").write_text(definition)
    load = functools.partial(Tokenizer.load, other)
    assert load().fingerprint != Tokenizer.load(tokenizer_folder).fingerprint
    with pytest.raises(UserError, match=rf"tokenizer_fingerprint \w{{12}} then, {load().fingerprint[:12]} now"):
        prepare_corpus(tmp_path / "out", {"web": SourceConfig(path=str(folder))}, load(), load, 0.1, 1)


def test_a_changed_input_is_refused_and_a_touched_one_is_not(tmp_path, corpus, prepare):
    folder, shards = corpus
    first = prepare(tmp_path / "out", folder)
    path = folder / "shard-1.parquet"
    os.utime(path)
    assert prepare(tmp_path / "out", folder) == first
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-1\.parquet: has changed since it was prepared: SHA-256"):
        prepare(tmp_path / "out", folder)
    write_shards(folder, {"shard-1": shards["shard-1"][:-1]})
    with pytest.raises(UserError, match=r"shard-1\.parquet: has changed since it was prepared: \d+ bytes then"):
        prepare(tmp_path / "out", folder)


def test_shards_that_come_or_go_are_named(tmp_path, corpus, prepare):
    folder, _ = corpus
    prepare(tmp_path / "out", folder)
    write_shards(folder, {"shard-9": make_texts(50, seed=9)})
    with pytest.raises(UserError, match=r"shards of web added: shard-9\.parquet"):
        prepare(tmp_path / "out", folder)
    (folder / "shard-9.parquet").unlink()
    (folder / "shard-0.parquet").rename(tmp_path / "elsewhere.parquet")
    with pytest.raises(UserError, match=r"shards of web gone: shard-0\.parquet"):
        prepare(tmp_path / "out", folder)
    (tmp_path / "out" / "manifest.json").unlink()
    assert len(prepare(tmp_path / "out", folder).sources["web"].inputs) == 2


def test_an_input_folder_may_move(tmp_path, corpus, prepare):
    folder, _ = corpus
    first = prepare(tmp_path / "out", folder)
    folder.rename(tmp_path / "moved")
    assert prepare(tmp_path / "out", tmp_path / "moved") == first


# Damage


def test_a_corrupt_shard_names_itself_and_the_rest_completes(tmp_path, corpus, prepare):
    folder, shards = corpus
    good = (folder / "shard-1.parquet").read_bytes()
    (folder / "shard-1.parquet").write_bytes(good[:100] + bytes(400) + good[500:])
    (folder / "shard-3.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"2 of 4 shards could not be prepared") as error:
        prepare(tmp_path / "out", folder)
    assert "shard-1.parquet" in str(error.value)
    assert "shard-3.parquet" in str(error.value)
    assert sorted(path.stem for path in (tmp_path / "out/web/records").iterdir()) == ["shard-0", "shard-2"]
    assert not (tmp_path / "out/manifest.json").exists()
    write_shards(folder, {"shard-1": shards["shard-1"]})
    (folder / "shard-3.parquet").unlink()
    assert prepare(tmp_path / "out", folder) == prepare(tmp_path / "other", folder)


def test_verification_finds_a_flipped_bit_and_a_missing_file(tmp_path, corpus, prepare):
    folder, _ = corpus
    manifest = prepare(tmp_path / "out", folder)
    path = tmp_path / "out/web/train/shard-1.bin"
    data = bytearray(path.read_bytes())
    data[77] ^= 4
    path.write_bytes(data)
    (tmp_path / "out/web/heldout/shard-0.idx").unlink()
    with pytest.raises(UserError, match=r"2 of 12 files") as error:
        manifest.verify(tmp_path / "out")
    assert "shard-1.bin has changed" in str(error.value)
    assert "shard-0.idx is absent" in str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_keeps_the_finished_shards(tmp_path, tokenizer_folder, workers):
    """On a small file system of its own, where one can be mounted."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", mount], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        shards = {f"s{i}": make_texts(100 if i < 2 else 4000, seed=i) for i in range(3)}
        folder = write_shards(tmp_path / "in", shards)
        load = functools.partial(Tokenizer.load, tokenizer_folder)
        arguments = ({"web": SourceConfig(path=str(folder))}, load(), load, 0.1, workers)
        with pytest.raises(
            UserError, match=r"no space left while writing tokens.* \d of 3 shards are finished and kept"
        ):
            prepare_corpus(mount, *arguments, process_min_bytes=0)
        left = tree(mount)
        assert not [
            name for name in left if name.endswith(".bin") and f"web/records/{Path(name).stem}.json" not in left
        ]
        subprocess.run(["mount", "-o", "remount,size=50m", mount], check=True)
        prepare_corpus(mount, *arguments, process_min_bytes=0)
        prepare_corpus(tmp_path / "whole", *arguments)
        assert tree(mount) == tree(tmp_path / "whole")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_write_error_ends_in_one_message(tmp_path, corpus, prepare, monkeypatch):
    folder, _ = corpus

    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("data_prep.encode.write_text_atomic", refuse)
    with pytest.raises(UserError, match="no space left while writing tokens"):
        prepare(tmp_path / "out", folder)
    monkeypatch.undo()
    assert prepare(tmp_path / "out", folder) == prepare(tmp_path / "other", folder)


# Text for the tokenizer


def test_training_text_leaves_out_what_is_held_out_and_shares_bytes_between_sources(
    tmp_path, prepare, tokenizer_folder
):
    big = write_shards(tmp_path / "big", {"a": make_texts(300, seed=1), "b": make_texts(300, seed=2)})
    small = write_shards(tmp_path / "small", {"c": [f"S {text}" for text in make_texts(40, seed=3)]})
    sources = {"big": SourceConfig(path=str(big)), "small": SourceConfig(path=str(small))}
    everything = list(training_texts(sources, 0.1, 10**9)())
    load = functools.partial(Tokenizer.load, tokenizer_folder)
    manifest = prepare_corpus(tmp_path / "out", sources, load(), load, 0.1, 1)
    assert len(everything) == sum(source.documents("train") for source in manifest.sources.values())
    assert sum(len(text.encode()) for text in everything) == sum(
        source.text_bytes("train") for source in manifest.sources.values()
    )
    stream = training_texts(sources, 0.1, 4000)
    part = list(stream())
    assert part == list(stream())
    sizes = [sum(len(text.encode()) for text in part if text.startswith("S ") == chosen) for chosen in (True, False)]
    assert 4000 <= sum(sizes) < 5000
    assert abs(sizes[0] - sizes[1]) < 1000


def test_training_text_needs_a_source_with_text(tmp_path):
    sources = {"ids": SourceConfig(path=str(tmp_path), ids_column="ids")}
    with pytest.raises(UserError, match="token ids"):
        next(training_texts(sources, 0.1, 100)())


# The stage


def test_the_stage_makes_corpus_tokenizer_and_tokens_once(tmp_path):
    overrides = ["data.demo_bytes=300000", "tokenizer.vocab_size=700", "tokenizer.transition=600"]
    config = parse(compose(["recipe=demo", f"run.dir={tmp_path}/run", "data.workers=1", *overrides]))
    manifest = run_data_stage(config)
    assert list(manifest.sources) == list(config.data.source_names)
    assert manifest.vocab_size == 700
    assert load_manifest(config.data_dir) == manifest
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer")
    for source in manifest.sources:
        read = IndexedTokens(manifest.prefixes(config.data_dir, source, "train")[0])
        assert tokenizer.decode(read.document(0)[:-1]).strip()
    before = tree(tmp_path / "run")
    assert run_data_stage(config) == manifest
    assert tree(tmp_path / "run") == before
    (tmp_path / "run/data/manifest.json").unlink()
    shutil.rmtree(tmp_path / "run/data/prose")
    run_data_stage(config)
    assert tree(tmp_path / "run") == before


# Command line


def test_command_line_prepares_repeats_and_verifies(tmp_path, corpus, tokenizer_folder, capsys):
    folder, _ = corpus
    out = str(tmp_path / "out")
    arguments = [
        "--input",
        f"{folder}/*.parquet",
        "--source",
        "web",
        "--tokenizer",
        str(tokenizer_folder),
        "--output",
        out,
    ]
    assert main([*arguments, "--workers", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--verify"]) == 0
    assert "files are as the manifest says" in capsys.readouterr().out
    assert main(["--output", out, "--verify"]) == 0
    assert load_manifest(tmp_path / "out").fingerprint in first


def test_command_line_ends_a_mistake_with_2_and_one_message(tmp_path, tokenizer_folder):
    arguments = ["--input", tmp_path / "none", "--tokenizer", tokenizer_folder, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "none") in done.stderr


def test_held_out_share_is_exact_in_the_limit():
    keys = [np.int64(i).tobytes() for i in range(20_000)]
    assert not any(encode.is_heldout(key, 0.0) for key in keys)
    share = sum(encode.is_heldout(key, 0.25) for key in keys) / len(keys)
    assert abs(share - 0.25) < 0.02
