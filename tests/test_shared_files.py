"""Locks and logs in folders that others can write to: no link in their place is followed, whatever opens them."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.corpus.preparation import prepare_corpus
from data_prep.tokenizers.tokenizer import build_tokenizer
from yxanul_nemo.config.data import TokenizerConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.file_locks import only_process
from yxanul_nemo.files import allow_as_umask, atomic_file
from yxanul_nemo.lock import RunLock
from yxanul_nemo.log import configure_logging
from yxanul_nemo.shared_files import open_for_appending


def lock_a_run(path: Path) -> None:
    with RunLock(path.parent):
        pass


def lock_a_corpus(path: Path) -> None:
    prepare_corpus(path.parent, {}, None, None, 0.0)


def build_a_tokenizer(path: Path) -> None:
    build_tokenizer(
        TokenizerConfig(name="x", kind="train_bpe", vocab_size=600), path.parent / "tokenizer", lambda: iter(())
    )


def write_metrics(path: Path) -> None:
    from yxanul_nemo.training.sinks import JsonlLogger

    JsonlLogger(path.parent, 0).log_metrics({"loss": 1.0}, step=1)


OPENED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a run's lock": (".lock", lock_a_run),
    "a corpus's lock": (".lock", lock_a_corpus),
    "a tokenizer's lock": (".tokenizer.lock", build_a_tokenizer),
    "the launcher's log": ("launcher.log", configure_logging),
    "metrics": ("metrics.jsonl", write_metrics),
    "a worker's log": ("phase-01.log", lambda path: open_for_appending(path).close()),
}


@pytest.mark.parametrize("kind", ["link to a file", "dangling link", "folder", "named pipe"])
@pytest.mark.parametrize("what", OPENED)
def test_only_a_plain_file_is_opened(tmp_path: Path, what: str, kind: str) -> None:
    name, act = OPENED[what]
    box, victim = tmp_path / "box", tmp_path / "victim"
    box.mkdir()
    victim.write_text('{"tokens_total": 0}\n')
    place = box / name
    match kind:
        case "link to a file":
            place.symlink_to(victim)
        case "dangling link":
            place.symlink_to(tmp_path / "absent")
        case "folder":
            place.mkdir()
        case "named pipe":
            os.mkfifo(place)
    with pytest.raises(UserError, match=f"{name}: is "):
        act(place)
    configure_logging()
    assert victim.read_text() == '{"tokens_total": 0}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "victim"]


def test_what_was_there_stays(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    for text in (b"one\n", b"two\n"):
        with open_for_appending(log) as handle:
            handle.write(text)
    with only_process(log, wait=False), pytest.raises(BlockingIOError), only_process(log, wait=False):
        pass
    assert log.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002])
def test_new_files_are_as_private_as_the_user_wants(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        with atomic_file(tmp_path / "atomic") as handle:
            handle.write(b"x")
        (tmp_path / "private").touch(0o600)
        allow_as_umask(tmp_path / "private")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("plain", "atomic", "private"), 0o666 & ~umask)


def test_a_tokenizer_is_not_built_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.json").write_text("{}")
    (tmp_path / ".tokenizer.tmp").symlink_to(victim)
    config = TokenizerConfig(name="x", kind="train_bpe", vocab_size=300)
    words = "the quick brown fox jumps over a lazy dog while seven wizards build boxes of liquor"
    build_tokenizer(config, tmp_path / "tokenizer", lambda: iter([words] * 50))
    assert [path.name for path in victim.iterdir()] == ["precious.json"]
    assert not (tmp_path / "tokenizer").is_symlink()
    assert json.loads((tmp_path / "tokenizer" / "fingerprint.json").read_text())["library"] == "tokenizers"
