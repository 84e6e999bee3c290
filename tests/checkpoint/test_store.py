"""The store of checkpoints under real faults: damage, kill -9 anywhere, a full disk, a read-only disk, a clock that lies."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import save_file

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.ledger import Expected, Ledger, PhasePlan
from yxanul_nemo.checkpoint.manifest import CorruptCheckpoint, FileEntry, Manifest, read_manifest
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fingerprint

REPO_DIR = Path(__file__).resolve().parents[2]
PLAN = PhasePlan(seq_len=1, tokens_per_step=1, planned_tokens=1000, lr_scale=1.0, grad_clip=1.0)
EXPECTED = Expected(
    corpus_fingerprint="c",
    tokenizer_fingerprint="t",
    model_fingerprint="m",
    config_fingerprint="o",
    window_order="w",
    phases=(PLAN, PLAN),
)
FILES = ("rank_00000.safetensors", "rank_00001.safetensors", "extra/fp8.json", "empty")


def ledger_at(tokens: int) -> Ledger:
    """Two phases of 1000 tokens each."""
    ledger = Ledger.fresh(EXPECTED)
    for left in (tokens, tokens - PLAN.planned_tokens):
        if left > 0 or not ledger.phases:
            ledger = ledger.start_phase(PLAN, 1, 1)
            consumed = min(left, PLAN.planned_tokens)
            ledger = ledger.consume(consumed, {"prose": consumed})
    return ledger


def content(name: str, tokens: int, salt: str = "") -> bytes:
    if name == "empty":
        return b""
    return hashlib.shake_256(f"{name} {tokens} {salt}".encode()).digest(900)


def write_state(temporary: Path, tokens: int, salt: str = "") -> None:
    for name in FILES:
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_bytes(content(name, tokens, salt))


def save(store: CheckpointStore, tokens: int, phase_end: bool = False, salt: str = "") -> Checkpoint:
    temporary = store.begin(tokens)
    write_state(temporary, tokens, salt)
    return store.commit(temporary, ledger_at(tokens), phase_end)


def holds(checkpoint: Checkpoint, salt: str = "") -> bool:
    return all((checkpoint.path / name).read_bytes() == content(name, checkpoint.tokens, salt) for name in FILES)


def tokens_in(store: CheckpointStore) -> list[int]:
    return [checkpoint.tokens for checkpoint in store.list()]


def good_in(store: CheckpointStore) -> set[int]:
    good = set()
    for checkpoint in store.list():
        try:
            store.check(checkpoint)
        except CorruptCheckpoint:
            continue
        good.add(checkpoint.tokens)
    return good


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where possible: the thousands of fsyncs of these tests would take minutes on a busy disk."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="test_store-", dir=memory if os.access(memory, os.W_OK) else None)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_latest=3)


@contextmanager
def mounted(*arguments: object) -> Iterator[None]:
    """`mount` with these arguments, the last one being the place; skips the test where that is not allowed."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)


# --- what a commit leaves ---


def test_commit_is_whole_and_listed(store):
    checkpoint = save(store, 20)
    assert checkpoint.path == store.root / "tokens_000000000000020"
    assert (checkpoint.tokens, checkpoint.phase, checkpoint.phase_end) == (20, 1, False)
    assert set(checkpoint.manifest.files) == {*FILES, "ledger.json"}
    for name, entry in checkpoint.manifest.files.items():
        raw = (checkpoint.path / name).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert (store.root / "latest").read_text() == "tokens_000000000000020\n"
    assert checkpoint.read_ledger() == ledger_at(20)
    assert store.newest_good() == checkpoint
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "tokens_000000000000020"]


def test_everything_is_on_disk_before_it_counts(store, monkeypatch):
    """A loss of power after the rename must not find empty files: each file and folder is synced before, the root after."""
    save(store, 10)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(fd: int) -> None:
        fsync(fd)
        events.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink())))

    def recording_rename(path: Path, target: Path) -> Path:
        events.append(("rename", str(path)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    temporary = store.begin(20)
    write_state(temporary, 20)
    checkpoint = store.commit(temporary, ledger_at(20), phase_end=False)
    committed_at = events.index(("rename", str(temporary)))
    synced_before = {path for kind, path in events[:committed_at] if kind == "sync"}
    assert {str(temporary / name) for name in FILES} <= synced_before
    assert {str(temporary), str(temporary / "extra")} <= synced_before
    assert any(".ledger.json." in path for path in synced_before) and any(
        ".manifest.json." in path for path in synced_before
    )
    assert events[committed_at + 1] == ("sync", str(store.root))
    assert holds(checkpoint)


def test_uncommitted_directories_do_not_exist(store):
    assert store.newest_good() is None and store.list() == [] and store.best() is None
    write_state(store.begin(20), 20)
    (store.root / "tokens_000000000000030").mkdir()
    write_state(store.root / "tokens_000000000000030", 30)
    assert store.newest_good() is None and store.list() == []


def test_rotation_keeps_newest_best_and_phase_ends(store):
    unknown = store.root / "notes.txt"
    for tokens in range(10, 110, 10):
        checkpoint = save(store, tokens, phase_end=tokens == 40)
        store.mark_best(checkpoint, "bits_per_byte", abs(tokens - 20))
        unknown.write_text("mine")
        (store.root / "tokens_12").mkdir(exist_ok=True)
    assert tokens_in(store) == [20, 40, 80, 90, 100]
    assert store.best().tokens == 20
    assert unknown.read_text() == "mine" and (store.root / "tokens_12").is_dir()


def test_order_is_by_tokens_whatever_the_clock_says(store, monkeypatch):
    for tokens in (10, 20, 30, 40, 50):
        monkeypatch.setattr(time, "time", lambda tokens=tokens: 2e9 - 1e6 * tokens)
        checkpoint = save(store, tokens)
        os.utime(checkpoint.path, (2e9 - tokens, 2e9 - tokens))
    created = [checkpoint.created_unix for checkpoint in store.list()]
    assert created == sorted(created, reverse=True)
    assert tokens_in(store) == [30, 40, 50]
    assert store.newest_good().tokens == 50


def test_end_of_a_phase_is_found_by_its_number(store):
    save(store, 500)
    save(store, 1000, phase_end=True)
    for tokens in (1200, 1400, 1600, 1800):
        save(store, tokens)
    save(store, 2000, phase_end=True)
    assert store.newest_good(phase_end_of=1).tokens == 1000
    assert store.newest_good(phase_end_of=2).tokens == 2000
    assert store.newest_good(phase_end_of=3) is None


def test_best_is_the_lowest_and_survives_bad_values(store):
    first, second = save(store, 10), save(store, 20)
    store.mark_best(first, "bits_per_byte", 1.5)
    for value in (1.5, 1.6, float("nan"), float("inf"), float("-inf")):
        store.mark_best(second, "bits_per_byte", value)
    assert store.best() == first
    store.mark_best(second, "bits_per_byte", 1.4)
    assert store.best() == second


@pytest.mark.parametrize(
    "pointer",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"checkpoint": "../../etc", "digest": "x", "metric": "m", "value": 0}',
        b'{"checkpoint": "tokens_000000000000099", "digest": "x", "metric": "m", "value": 0}',
        b'{"checkpoint": "tokens_000000000000010", "digest": "x", "metric": "m", "value": 0}',
        b'{"checkpoint": 7, "digest": "x", "metric": "m", "value": "low"}',
    ],
)
def test_garbage_in_the_pointer_best_is_not_followed(store, pointer):
    checkpoint = save(store, 10)
    (store.root / "best").write_bytes(pointer)
    assert store.best() is None
    save(store, 20)
    store.mark_best(checkpoint, "bits_per_byte", 2.0)
    assert store.best() == checkpoint


def test_damaged_best_is_not_handed_out(store, log):
    checkpoint = save(store, 10)
    store.mark_best(checkpoint, "bits_per_byte", 2.0)
    flip(checkpoint.path / FILES[0], 9)
    assert store.best() is None
    assert FILES[0] in log.text


# --- the same tokens twice ---


def test_same_tokens_again_replaces(store):
    save(store, 10)
    save(store, 20, salt="first")
    again = save(store, 20, phase_end=True, salt="second")
    assert again.phase_end and holds(again, "second")
    assert store.newest_good() == again
    assert sorted(path.name for path in store.root.glob("tokens*")) == [
        "tokens_000000000000010",
        "tokens_000000000000020",
    ]


def test_end_of_a_phase_is_not_replaced_by_less(store):
    end = save(store, 20, phase_end=True, salt="end")
    assert save(store, 20, salt="later") == end
    assert holds(store.newest_good(), "end")
    assert not list(store.root.glob(".tmp-*"))


def test_damaged_one_of_the_same_tokens_is_kept_aside(store):
    for _ in range(2):
        flip(save(store, 20, phase_end=True).path / FILES[0], 9)
    again = save(store, 20)
    assert holds(again) and store.newest_good() == again
    assert sorted(path.name for path in store.root.glob("*.bad-*")) == [
        f"{again.path.name}.bad-1",
        f"{again.path.name}.bad-2",
    ]


def test_a_file_in_the_place_of_a_checkpoint_is_moved_aside(store):
    store.root.mkdir(parents=True)
    (store.root / "tokens_000000000000020").write_text("mine")
    assert store.list() == []
    save(store, 20)
    assert (store.root / "tokens_000000000000020.bad-1").read_text() == "mine"


def test_replaced_one_counts_if_a_kill_left_nothing_else(store):
    """Between the two renames of a replacement only the `.old` name is there."""
    save(store, 10)
    path = save(store, 20, phase_end=True).path
    path.rename(path.with_name(path.name + ".old"))
    assert store.newest_good().tokens == 20 and store.newest_good(phase_end_of=1).tokens == 20
    save(store, 20, phase_end=True, salt="new")
    assert holds(store.newest_good(), "new") and tokens_in(store) == [10, 20]


# --- damage ---


@pytest.mark.parametrize("name", [*FILES[:3], "ledger.json", "manifest.json"])
def test_flipped_bit_is_found_in_every_kind_of_file(store, name):
    save(store, 10)
    checkpoint = save(store, 20)
    raw = (checkpoint.path / name).read_bytes()
    for bit in random.Random(name).sample(range(8 * len(raw)), 60):
        flip(checkpoint.path / name, bit)
        with pytest.raises(CorruptCheckpoint, match=name.replace(".", r"\.")):
            store.check(checkpoint)
        flip(checkpoint.path / name, bit)
    store.check(checkpoint)


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_found(store):
    checkpoint = save(store, 20)
    chance = random.Random(5)
    for byte in range((checkpoint.path / "manifest.json").stat().st_size):
        bit = 8 * byte + chance.randrange(8)
        flip(checkpoint.path / "manifest.json", bit)
        with pytest.raises(CorruptCheckpoint):
            read_manifest(checkpoint.path)
        flip(checkpoint.path / "manifest.json", bit)
    assert read_manifest(checkpoint.path) == checkpoint.manifest


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def make_empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with open(path, "ab") as handle:
        handle.write(b"\0")


def replace_by_link(path: Path) -> None:
    elsewhere = path.parents[1] / f"elsewhere-{path.name}"
    shutil.copyfile(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", [*FILES[:3], "ledger.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [cut, cut_one_byte, make_empty, lengthen, Path.unlink, replace_by_link, replace_by_folder, replace_by_pipe],
)
def test_falls_back_to_the_one_before_and_says_why(store, log, name, damage: Callable[[Path], None]):
    save(store, 10)
    save(store, 20)
    checkpoint = save(store, 30)
    damage(checkpoint.path / name)
    with pytest.raises(CorruptCheckpoint):
        store.check(checkpoint)
    good = store.newest_good()
    assert good.tokens == 20 and holds(good)
    assert f"skipping bad checkpoint {checkpoint.path.name}: {name}" in log.text
    assert checkpoint.path.is_dir()


def test_planted_file_is_found(store):
    """A loader that reads `rank_*.safetensors` would take it for a part of the state."""
    save(store, 10)
    checkpoint = save(store, 20)
    (checkpoint.path / ".nfs0001").write_text("left by a file server")
    store.check(checkpoint)
    (checkpoint.path / "rank_00002.safetensors").write_text("planted")
    with pytest.raises(CorruptCheckpoint, match=r"rank_00002.* not in the manifest"):
        store.check(checkpoint)
    assert store.newest_good().tokens == 10


def test_renamed_directory_is_not_taken_for_another_state(store):
    save(store, 10)
    path = save(store, 20).path
    path.rename(store.root / "tokens_000000000000099")
    assert store.newest_good().tokens == 10


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "./a", "a//b", "a/", "", ".", "a\0b", "manifest.json"]
)
def test_manifest_that_names_files_outside_is_refused(store, path):
    checkpoint = save(store, 20)
    fields = checkpoint.manifest.model_dump(mode="json")
    fields["files"][path] = {"size_bytes": 1, "sha256": "0" * 64}
    signed = json.dumps(fields | {"sha256": fingerprint(fields)}, indent=1, ensure_ascii=False) + "\n"
    (checkpoint.path / "manifest.json").write_text(signed)
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json: is invalid"):
        read_manifest(checkpoint.path)


@pytest.mark.parametrize(
    "raw",
    [b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"files": {"a": 1}}', b'{"tokens": ' + b"9" * 5000 + b"}"],
)
def test_manifest_of_garbage_is_refused(store, raw):
    save(store, 10)
    path = save(store, 20).path
    (path / "manifest.json").write_bytes(raw)
    with pytest.raises(CorruptCheckpoint):
        read_manifest(path)
    assert store.newest_good().tokens == 10


LEDGER_ENTRY = {"ledger.json": FileEntry(size_bytes=1, sha256="0" * 64)}
VALID = Manifest(tokens=20, phase=1, phase_end=False, created_unix=2e9, files=LEDGER_ENTRY).to_text().encode()
PLACE = st.integers(0, len(VALID))


@given(st.binary(max_size=200) | st.tuples(PLACE, PLACE, st.binary(max_size=20)))
@settings(max_examples=500, deadline=None)
def test_manifest_reader_never_fails_otherwise(change):
    raw = change
    if isinstance(change, tuple):
        start, end, inserted = min(change[:2]), max(change[:2]), change[2]
        raw = VALID[:start] + inserted + VALID[end:]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(raw)
        try:
            manifest = read_manifest(Path(folder))
        except CorruptCheckpoint:
            assert raw != VALID
        else:
            assert raw == VALID and manifest.tokens == 20


def test_sizes_alone_miss_a_flipped_bit_of_a_large_file_only(tmp_path):
    store = CheckpointStore(tmp_path, verify="size")
    temporary = store.begin(20)
    (temporary / "large").write_bytes(bytes(3 << 20))
    (temporary / "small").write_bytes(bytes(300))
    checkpoint = store.commit(temporary, ledger_at(20), phase_end=False)
    flip(checkpoint.path / "large", 99)
    store.check(checkpoint)
    with pytest.raises(CorruptCheckpoint, match=r"large: has changed"):
        CheckpointStore(tmp_path, verify="full").check(checkpoint)
    flip(checkpoint.path / "small", 99)
    with pytest.raises(CorruptCheckpoint, match="small: has changed"):
        store.check(checkpoint)
    cut(checkpoint.path / "large")
    with pytest.raises(CorruptCheckpoint, match="large: has 1572864 bytes instead of 3145728"):
        store.check(checkpoint)


def test_all_damaged_is_said_and_not_started_over(store):
    for tokens in (10, 20):
        flip(save(store, tokens).path / FILES[0], 5)
    with pytest.raises(UserError, match=r"none of its 2 checkpoints can be used \(tokens_000000000000020/rank_00000"):
        store.newest_good()
    assert store.newest_good(phase_end_of=1) is None


@pytest.mark.parametrize("damage", [cut, lambda path: flip(path, 77)])
def test_bad_one_ahead_does_not_push_good_ones_out(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep_latest=2)
    for tokens in (10, 20, 30):
        save(CheckpointStore(tmp_path, keep_latest=9), tokens)
    damage(tmp_path / "tokens_000000000000030" / FILES[0])
    assert store.newest_good().tokens == 20
    save(store, 25)
    assert good_in(store) == {20, 25}
    assert store.newest_good().tokens == 25
    assert (tmp_path / "tokens_000000000000030").is_dir()


def test_truncated_one_does_not_count_as_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_latest=2)
    save(store, 10)
    cut(save(store, 20).path / FILES[0])
    save(store, 30)
    assert good_in(store) == {10, 30}


# --- kill -9 ---

KILLED = """
import hashlib, os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from pathlib import Path
from test_store import CheckpointStore, save

def train(root):
    # Goes on from what is there, as a trainer does, and reports each commit once it has returned.
    store = CheckpointStore(root, keep_latest=2)
    store.clean_temporaries()
    newest = store.newest_good()
    tokens = newest.tokens if newest else 0
    while True:
        tokens += 1
        checkpoint = save(store, tokens, phase_end=tokens % 50 == 0)
        store.mark_best(checkpoint, "bits_per_byte", tokens % 5)
        os.write(1, b"committed %d\\n" % tokens)

def save_once(root, tokens, kill_at):
    # Dies right before the file operation number `kill_at`.
    store = CheckpointStore(root, keep_latest=2)
    count = 0
    def count_operations(event, arguments):
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count_operations)
    save(store, tokens, salt="again")

for line in sys.stdin:
    task, root, *numbers = line.split()
    pid = os.fork()
    if pid == 0:
        # Before its work: on a busy machine it may have committed before its parent goes on.
        os.write(1, b"pid %d\\n" % os.getpid())
        train(Path(root)) if task == "train" else save_once(Path(root), *map(int, numbers))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    os.write(1, b"ended %d\\n" % status)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen]:
    """A process that forks children to be killed, so that each costs no start of Python."""
    command = [sys.executable, "-c", KILLED, __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(
        command, cwd=REPO_DIR, env={**os.environ, "PYTHONPATH": str(REPO_DIR)}, text=True, bufsize=1, **pipes
    )
    yield process
    process.stdin.close()
    assert process.wait() == 0
    process.stdout.close()


def test_kill_at_random_moments_loses_nothing(nursery, tmp_path):
    """100 kills of a process that commits in a loop; each time it goes on where the killed one had come to."""
    chance = random.Random(6)
    store = CheckpointStore(tmp_path / "checkpoints", keep_latest=2)
    committed, kills, interrupted = 0, 0, 0
    while kills < 100:
        nursery.stdin.write(f"train {store.root}\n")
        pid = int(nursery.stdout.readline().removeprefix("pid "))
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        kills += 1
        while not (line := nursery.stdout.readline()).startswith("ended"):
            committed = int(line.removeprefix("committed "))
        assert line == f"ended {signal.SIGKILL.value}\n"

        interrupted += any(store.root.glob(".tmp-*"))
        newest = store.newest_good()
        if committed == 0 and newest is None:
            continue
        assert newest.tokens in (committed, committed + 1)
        assert holds(newest) and newest.read_ledger() == ledger_at(newest.tokens)
        kept = {tokens for tokens in (newest.tokens - 1, newest.tokens) if tokens > 0}
        kept |= set(range(50, newest.tokens + 1, 50))
        assert kept <= good_in(store) == set(tokens_in(store)), "a checkpoint that had to stay is gone or damaged"
        committed = newest.tokens
        assert committed < 6 or store.best() is not None
    assert committed > 20, "the killed processes came to nothing; the test proves nothing"
    assert interrupted > 5, "no kill fell into a save; the test proves nothing"


@pytest.mark.parametrize("case", ["next", "replace", "replace damaged"])
def test_kill_before_every_single_file_operation(nursery, tmp_path, case):
    """One kill before each file operation of a save with rotation, for a new position and for one that is there already."""
    base = CheckpointStore(tmp_path / "base", keep_latest=9)
    for tokens in (10, 20, 30, 40):
        checkpoint = save(base, tokens, phase_end=tokens == 10)
    base.mark_best(base.list()[1], "bits_per_byte", 1.0)
    tokens = 50 if case == "next" else 40
    if case == "replace damaged":
        flip(checkpoint.path / FILES[0], 1)
    before = good_in(base)
    must_stay = {10, 20, 40} & before

    kill_at, status, names = 0, signal.SIGKILL.value, set()
    while status == signal.SIGKILL.value:
        kill_at += 1
        root = tmp_path / f"killed-{kill_at}"
        shutil.copytree(base.root, root)
        nursery.stdin.write(f"save_once {root} {tokens} {kill_at}\n")
        nursery.stdout.readline()
        status = int(nursery.stdout.readline().removeprefix("ended "))

        store = CheckpointStore(root, keep_latest=2)
        good = good_in(store)
        assert must_stay <= good, f"killed before operation {kill_at}"
        newest = store.newest_good()
        assert newest.tokens >= max(before) and (holds(newest) or holds(newest, "again"))
        assert store.best().tokens == 20
        names.add(tuple(sorted(path.name[:10] for path in root.iterdir())))

        store.clean_temporaries()
        assert not list(root.glob(".*"))
        save(store, 60)
        assert {10, 20, 60} <= good_in(store) and store.newest_good().tokens == 60
        assert not any(path.with_suffix("").exists() for path in root.glob("*.old"))
        shutil.rmtree(root)
    assert status == 0 and kill_at > 30 and len(names) > 3


# --- full and read-only disks ---


def save_on_full_disk(store: CheckpointStore, tokens: int) -> tuple[str, str]:
    """The step that was reached, and the message with which it failed; ("done", "") if none did."""
    step = "begin"
    try:
        temporary = store.begin(tokens)
        with store.writing(temporary, SafetensorError):
            step = "files"
            write_state(temporary, tokens)
            step = "safetensors"
            save_file({"weight": np.ones(2000, np.uint8)}, temporary / "weight.safetensors")
        step = "commit"
        store.commit(temporary, ledger_at(tokens), phase_end=False)
    except UserError as error:
        return step, str(error)
    return "done", ""


def fill_blocks(folder: Path, free: int) -> None:
    """Leave `free` blocks of 4096 bytes."""
    with open(folder / "filler", "wb", buffering=0) as handle:
        left = os.statvfs(folder).f_bavail - free
        if left > 0:
            handle.write(bytes(4096 * left))


def fill_names(folder: Path, free: int) -> None:
    """Leave `free` inodes."""
    (folder / "filler").mkdir()
    for number in range(os.statvfs(folder).f_favail - free):
        (folder / "filler" / str(number)).touch()


@pytest.mark.parametrize(
    ("fill", "steps"),
    [
        # A folder takes no block here, so `begin` cannot fail for want of blocks.
        (fill_blocks, {"files", "safetensors", "commit", "done"}),
        (fill_names, {"begin", "files", "safetensors", "commit", "done"}),
    ],
)
def test_full_disk_at_every_step(tmp_path, fill, steps):
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=1m,nr_inodes=100", "tmpfs", disk):
        store = CheckpointStore(disk / "checkpoints", keep_latest=1)
        save(store, 10)
        seen = set()
        for free in range(14):
            fill(disk, free)
            step, message = save_on_full_disk(store, 20)
            seen.add(step)
            newest = store.newest_good()
            assert holds(newest) and not list(store.root.glob(".*")), f"{free} left: {step} {message}"
            if step == "done":
                assert newest.tokens == 20
            else:
                assert "no space left" in message and "Free space" in message and str(store.root) in message
                assert newest.tokens == 10 or "itself is complete" in message
            subprocess.run(["rm", "-r", disk / "filler"], check=True)
            save(store, 20)
            shutil.rmtree(store.root)
            save(store, 10)
        assert seen == steps


def test_read_only_disk(store):
    save(store, 10)
    left = store.begin(20)
    write_state(left, 20)
    with mounted("--bind", store.root, store.root):
        subprocess.run(["mount", "-o", "remount,bind,ro", store.root], check=True)
        for attempt in (lambda: store.begin(20), lambda: store.commit(left, ledger_at(20), phase_end=False)):
            with pytest.raises(UserError, match=r"cannot be written while .*\(Read-only file system\).*permissions"):
                attempt()
        with pytest.raises(UserError, match=r"cannot be written while .*\(Read-only file system\).*permissions"):
            store.mark_best(store.newest_good(), "bits_per_byte", 1.0)
        store.clean_temporaries()
        assert holds(store.newest_good()) and store.newest_good().tokens == 10
    store.clean_temporaries()
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "tokens_000000000000010"]


def test_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints"):
        CheckpointStore(tmp_path / "checkpoints").begin(10)


def test_shards_that_are_links_are_not_committed(store, tmp_path):
    temporary = store.begin(20)
    (temporary / "weights").symlink_to(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="link"):
        store.commit(temporary, ledger_at(20), phase_end=False)
    assert list(store.root.iterdir()) == [] and tmp_path.is_dir()


def test_cleaning_touches_only_its_own(store, tmp_path):
    save(store, 10)
    write_state(store.begin(20), 20)
    (store.root / ".latest.abc.tmp").write_text("half")
    (store.root / ".tmp-delete-tokens_000000000000005-00").mkdir()
    (tmp_path / "precious").write_text("mine")
    (store.root / ".tmp-link").symlink_to(tmp_path)
    (store.root / ".other").mkdir()
    store.clean_temporaries()
    assert sorted(path.name for path in store.root.iterdir()) == [
        ".other",
        ".tmp-link",
        "latest",
        "tokens_000000000000010",
    ]
    assert (tmp_path / "precious").read_text() == "mine"
    CheckpointStore(tmp_path / "absent").clean_temporaries()


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.keep_latest"):
        CheckpointStore(tmp_path, keep_latest=0)
