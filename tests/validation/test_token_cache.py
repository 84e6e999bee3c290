"""Documents are tokenized once: what is kept, when it is made anew, and what happens where it is damaged or cannot be kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus.manifest import load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.outputs import DomainConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.validation.domains import load_domains
from yxanul_nemo.validation.scoring import Document
from yxanul_nemo.validation.stage import run_domains
from yxanul_nemo.validation.token_cache import TokenCache

DOCUMENTS = [Document(np.array([5, 6, 199_999]), 9), Document(np.empty(0, np.int64), 0), Document(np.array([7]), 2)]


def never() -> list[Document]:
    raise AssertionError("it was made again")


def same(found: list[Document], expected: list[Document]) -> bool:
    return [(d.ids.tolist(), d.text_bytes) for d in found] == [(d.ids.tolist(), d.text_bytes) for d in expected]


@pytest.mark.parametrize("documents", [DOCUMENTS, [], DOCUMENTS[1:2]])
def test_documents_come_back(tmp_path: Path, documents: list[Document]) -> None:
    cache = TokenCache(tmp_path)
    assert same(cache.documents({"of": 1}, lambda: documents), documents)
    assert same(cache.documents({"of": 1}, never), documents)
    assert same(cache.documents({"of": 2}, lambda: DOCUMENTS[:1]), DOCUMENTS[:1])


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    cache.documents({}, lambda: DOCUMENTS)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    places = range(0, len(good), 7)
    damaged = [good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :] for place in places]
    for raw in [b"", good[: len(good) // 2], b"x" * 100, *damaged]:
        path.write_bytes(raw)
        assert same(cache.documents({}, lambda: DOCUMENTS), DOCUMENTS)


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "documents").write_text("a file where the folder would be")
    assert same(TokenCache(tmp_path / "documents").documents({}, lambda: DOCUMENTS), DOCUMENTS)
    assert "are not kept in" in log.text


def test_the_domains_of_a_run_are_read_without_its_tokenizer_the_second_time(
    prepared: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer").symlink_to(prepared / "tokenizer")
    (tmp_path / "own.jsonl").write_text('{"text": "first text"}\n{"text": "second"}\n')
    config = make_config(f"run.dir={tmp_path}", f"data.dir={prepared / 'data'}")
    own = {"own": DomainConfig(path=str(tmp_path / "own.jsonl"))}
    validation = config.validation.model_copy(update={"domains": config.validation.domains | own})
    config = config.model_copy(update={"validation": validation})
    manifest, tokenizer = load_manifest(config.data_dir), Tokenizer.load(prepared / "tokenizer")
    first = run_domains(config, manifest)
    assert [d.text_bytes for d in first["own"]] == [10, 6]
    again = load_domains(config, manifest, never)
    assert first.keys() == again.keys() and all(same(again[name], first[name]) for name in first)
    assert [tokenizer.decode(d.ids) for d in again["own"]] == ["first text", "second"]
    (tmp_path / "own.jsonl").write_text('{"text": "another"}\n')
    assert [tokenizer.decode(d.ids) for d in run_domains(config, manifest)["own"]] == ["another"]
    (tmp_path / "own.jsonl").unlink()
    with pytest.raises(UserError, match=r"validation\.domains\.own\.path: .*own\.jsonl does not exist"):
        run_domains(config, manifest)
