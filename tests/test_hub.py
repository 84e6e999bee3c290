"""The real client of the Hugging Face hub against a local server that answers as the hub does."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from tests.fetch.conftest import hub  # noqa: F401 - a fixture
from tests.fetch.hub_server import HubServer
from yxanul_nemo.errors import UserError
from yxanul_nemo.hub import HubRepo

LARGE = np.random.default_rng(0).bytes(3_000_000)
OTHER = np.random.default_rng(1).bytes(5_000)


@pytest.fixture
def dataset(hub: HubServer) -> HubServer:  # noqa: F811
    hub.add("them/texts", {"README.md": b"about", "b/2.parquet": OTHER, "b/1.parquet": LARGE, "c.json": b'{"a": 1}\n'})
    return hub


def repo(revision: str = "main", name: str = "them/texts") -> HubRepo:
    return HubRepo("data.sources.text.hub", name, revision)


def test_files_come_in_order_with_their_bytes_through_the_redirect(dataset: HubServer) -> None:
    found = repo()
    assert found.commit == dataset.repos["them/texts"].commit
    files = found.files(["b/*.parquet"])
    assert [file.path for file in files] == ["b/1.parquet", "b/2.parquet"]
    assert [file.size_bytes for file in files] == [len(LARGE), len(OTHER)]
    assert found.download(files[0]).read_bytes() == LARGE
    # A small file is no redirect, and its hash is git's.
    (small,) = found.files(["c.json"])
    assert found.download(small).read_bytes() == b'{"a": 1}\n'


def test_what_is_in_the_cache_is_not_asked_for_again(dataset: HubServer) -> None:
    for _ in range(2):
        repo().download(repo().files(["b/1*"])[0])
    assert dataset.downloads() == ["them/texts/b/1.parquet"]


def test_a_connection_that_breaks_goes_on_at_its_byte(dataset: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # What comes is kept in pieces of this size.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    dataset.break_after["b/1.parquet"] = [1_000_000, 700_000]
    found = repo()
    assert found.download(found.files(["b/1*"])[0]).read_bytes() == LARGE
    ranges = [asked for method, path, asked in dataset.requests if method == "GET" and path.startswith("/store/")]
    assert ranges[0] is None
    starts = [int(str(asked).removeprefix("bytes=").partition("-")[0]) for asked in ranges[1:]]
    assert len(starts) == 2
    assert 0 < starts[0] <= 1_000_000 < starts[1] <= 1_700_000


def test_other_bytes_than_stated_are_fetched_once_more(dataset: HubServer) -> None:
    dataset.spoilt["b/1.parquet"] = 1
    found = repo()
    assert found.download(found.files(["b/1*"])[0]).read_bytes() == LARGE
    assert len(dataset.downloads()) == 2


def test_other_bytes_every_time_are_refused_and_not_kept(dataset: HubServer) -> None:
    dataset.spoilt["b/1.parquet"] = 100
    found = repo()
    with pytest.raises(UserError, match=r"b/1.parquet of them/texts came 2 times with other bytes"):
        found.download(found.files(["b/1*"])[0])
    kept = [
        path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file() and path.stat().st_size == len(LARGE)
    ]
    assert kept == []


def test_a_file_damaged_in_the_cache_is_fetched_again(dataset: HubServer) -> None:
    found = repo()
    (file,) = found.files(["b/1*"])
    path = found.download(file)
    blob = path.resolve()
    blob.chmod(0o644)
    blob.write_bytes(LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    assert hashlib.sha256(found.download(file).read_bytes()).hexdigest() == file.digest


def test_a_branch_that_moves_on_does_not_mix_commits(dataset: HubServer) -> None:
    found = repo()
    (file,) = found.files(["b/2*"])
    dataset.add("them/texts", {"b/2.parquet": LARGE})
    # The hub keeps old commits; this server does not, which must not pass for the new content.
    with pytest.raises(UserError, match="no such revision"):
        found.download(file)
    assert repo().download(repo().files(["b/2*"])[0]).read_bytes() == LARGE


def test_without_network_the_cache_is_enough(dataset: HubServer) -> None:
    before = repo()
    before.download(before.files(["b/1*"])[0])
    dataset.stop()
    for revision in ("main", before.commit):
        offline = repo(revision)
        files = offline.files(["b/*"])
        assert [(file.path, file.size_bytes) for file in files] == [("b/1.parquet", len(LARGE))]
        assert offline.download(files[0]).read_bytes() == LARGE
    with pytest.raises(UserError, match=r"does not answer.*HF_ENDPOINT"):
        repo().files(["c.json"])
    with pytest.raises(UserError, match=r"them/others cannot be fetched"):
        repo(name="them/others")


@pytest.mark.parametrize(
    ("name", "revision", "pattern", "message"),
    [
        ("them/nothing", "main", "*", r"them/nothing does not exist or is private.*HF_TOKEN"),
        ("them/texts", "v2", "*", r"no such revision"),
        ("them/texts", "0" * 40, "*", r"no such revision"),
        ("them/texts", "main", "b/3.parquet", r"has no file b/3.parquet.*Did you mean 'b/\d.parquet'"),
        ("them/private", "main", "*", r"does not exist or is private.*HF_TOKEN"),
        ("them/gated", "main", "1.parquet", r"accept its terms.*Accept them at http.*/datasets/them/gated"),
        ("them/broken", "main", "1.parquet", r"them/broken.*(refuses|broke off).*kept"),
    ],
)
def test_what_the_hub_refuses_is_told(
    dataset: HubServer, monkeypatch: pytest.MonkeyPatch, name: str, revision: str, pattern: str, message: str
) -> None:
    dataset.add("them/private", {"1.parquet": OTHER}, token="hf_right")
    dataset.add("them/gated", {"1.parquet": OTHER}, token="hf_right", gated=True)
    dataset.add("them/broken", {"1.parquet": OTHER})
    dataset.failing["1.parquet"] = 410 if name == "them/broken" else 0
    with pytest.raises(UserError, match=message):
        found = repo(revision, name)
        found.download(found.files([pattern])[0])


def test_a_token_opens_what_is_private(dataset: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.add("them/private", {"1.parquet": OTHER}, token="hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    found = repo(name="them/private")
    assert found.download(found.files(["1.parquet"])[0]).read_bytes() == OTHER
