"""Nothing is lost when preparation is killed or the disk is full, and changes and damage are refused by name."""

import errno
import fcntl
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.corpus import encode
from data_prep.corpus.preparation import prepare_corpus
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.errors import UserError

REPOSITORY = Path(__file__).parents[3]


# Repeating, resuming, being killed


def test_repeating_writes_nothing(tmp_path, corpus, prepare):
    folder, _ = corpus
    first = prepare(tmp_path / "out", folder)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert prepare(tmp_path / "out", folder) == first
    assert {path: path.stat().st_mtime_ns for path in times if path.name != ".lock"} == {
        path: mtime for path, mtime in times.items() if path.name != ".lock"
    }


def test_only_what_is_missing_is_made_again(tmp_path, corpus, prepare, monkeypatch, tree):
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
        "data_prep.corpus.pool.prepare_shard", lambda task, *rest: done.append(task.shard.stem) or original(task, *rest)
    )
    prepare(out, folder)
    assert sorted(done) == ["shard-1", "shard-2"]
    assert tree(out) == before


PROGRAM = """
import functools, sys
from pathlib import Path
from data_prep.corpus.preparation import prepare_corpus
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.load import compose, parse

if __name__ == "__main__":
    out, folder, tokenizer, workers = sys.argv[1:]
    load = functools.partial(Tokenizer.load, Path(tokenizer))
    print("ready", flush=True)
    prepare_corpus(Path(out), {"web": SourceConfig(path=folder)}, load(), load, 0.1, int(workers), process_min_bytes=0)
"""


@pytest.mark.parametrize(("workers", "kills"), [(1, 4), (2, 2)])
def test_killed_at_random_moments_it_ends_the_same(
    tmp_path, prepare, tokenizer_folder, workers, kills, make_texts, write_shards, tree
):
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
def test_ended_at_each_step_towards_the_disk_it_ends_the_same(
    tmp_path, prepare, monkeypatch, call, make_texts, write_shards, tree
):
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


def test_a_changed_option_is_refused_by_name(tmp_path, corpus, prepare, tree):
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


def test_a_changed_input_is_refused_and_a_touched_one_is_not(tmp_path, corpus, prepare, write_shards):
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


def test_shards_that_come_or_go_are_named(tmp_path, corpus, prepare, make_texts, write_shards):
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


def test_another_source_comes_beside_those_of_other_runs(tmp_path, corpus, tokenizer_folder, make_texts, write_shards):
    folder, _ = corpus
    load = functools.partial(Tokenizer.load, tokenizer_folder)
    web, law = SourceConfig(path=str(folder)), SourceConfig(path=str(tmp_path / "law"))
    write_shards(tmp_path / "law", {"only": make_texts(40, seed=9)})
    first = prepare_corpus(tmp_path / "out", {"web": web}, load(), load, 0.1, 1)
    both = prepare_corpus(tmp_path / "out", {"web": web, "law": law}, load(), load, 0.1, 1)
    assert list(both.sources) == ["web", "law"] and both.of(["web"]).fingerprint == first.fingerprint
    assert both.source_fingerprint("web") == first.source_fingerprint("web") != both.source_fingerprint("law")
    assert prepare_corpus(tmp_path / "out", {"web": web}, load(), load, 0.1, 1) == both, "the other run's source stays"


def test_an_input_folder_may_move(tmp_path, corpus, prepare):
    folder, _ = corpus
    first = prepare(tmp_path / "out", folder)
    folder.rename(tmp_path / "moved")
    assert prepare(tmp_path / "out", tmp_path / "moved") == first


@pytest.mark.parametrize("folder_stays", [True, False])
def test_a_finished_corpus_needs_its_input_no_more(tmp_path, corpus, prepare, caplog, folder_stays):
    folder, _ = corpus
    first = prepare(tmp_path / "out", folder)
    shutil.rmtree(folder)
    if folder_stays:
        folder.mkdir()
    assert prepare(tmp_path / "out", folder) == first
    assert "the files of web are gone" in caplog.text
    with pytest.raises(UserError, match=r"data\.sources\.web\.path"):
        prepare(tmp_path / "other", folder)
    with pytest.raises(UserError, match=r"heldout_fraction 0\.1 then, 0\.2 now"):
        prepare(tmp_path / "out", folder, heldout_fraction=0.2)
    (tmp_path / "out/web/train/shard-1.bin").unlink()
    with pytest.raises(
        UserError, match=r"tokens of shard-1\.parquet are absent or cut short, and the files they are made of"
    ):
        prepare(tmp_path / "out", folder)


# Damage


def test_a_corrupt_shard_names_itself_and_the_rest_completes(tmp_path, corpus, prepare, write_shards):
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
def test_a_full_disk_keeps_the_finished_shards(tmp_path, tokenizer_folder, workers, make_texts, write_shards, tree):
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

    monkeypatch.setattr("data_prep.corpus.encode.write_text_atomic", refuse)
    with pytest.raises(UserError, match="no space left while writing tokens"):
        prepare(tmp_path / "out", folder)
    monkeypatch.undo()
    assert prepare(tmp_path / "out", folder) == prepare(tmp_path / "other", folder)
