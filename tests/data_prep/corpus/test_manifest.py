"""The manifest: comes back as it was written, names what is wrong with a file, and its fingerprint follows the tokens alone."""

import json

import pytest

from data_prep.corpus.manifest import CorpusManifest, InputEntry, ShardEntry, SourceManifest, load_manifest
from yxanul_nemo.errors import UserError


def entry(prefix="web/train/a", **changes):
    values = {
        "prefix": prefix,
        "documents": 3,
        "tokens": 30,
        "text_bytes": 100,
        "bin_sha256": "b" * 64,
        "idx_sha256": "c" * 64,
    }
    return ShardEntry(**values | changes)


def manifest(**changes):
    source = SourceManifest(
        column="text",
        holds_ids=False,
        inputs=[
            InputEntry(
                file="a.parquet", bytes=1, sha256="a" * 64, rows=6, skipped_null=1, skipped_empty=2, skipped_not_utf8=0
            )
        ],
        train=[entry(), entry("web/train/b", tokens=12)],
        heldout=[entry("web/heldout/a", documents=1, tokens=5)],
    )
    values = {
        "tokenizer_fingerprint": "t" * 64,
        "vocab_size": 300,
        "eos_id": 0,
        "dtype": "uint16",
        "heldout_fraction": 0.1,
    }
    return CorpusManifest(**values | {"sources": {"web": source}} | changes)


def test_round_trip(tmp_path):
    manifest().save(tmp_path)
    assert load_manifest(tmp_path) == manifest()
    before = (tmp_path / "manifest.json").read_bytes()
    load_manifest(tmp_path).save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_sums_are_over_the_shards(tmp_path):
    source = manifest().sources["web"]
    assert (source.tokens("train"), source.documents("train"), source.text_bytes("train")) == (42, 6, 200)
    assert (source.tokens("heldout"), source.documents("heldout")) == (5, 1)
    assert manifest().prefixes(tmp_path, "web", "train") == [tmp_path / "web/train/a", tmp_path / "web/train/b"]


def with_source(**changes):
    source = manifest().sources["web"]
    return manifest(sources={"web": source.model_copy(update=changes)})


@pytest.mark.parametrize(
    "other",
    [
        manifest(tokenizer_fingerprint="u" * 64),
        manifest(dtype="int32", vocab_size=70_000),
        manifest(sources={"text": manifest().sources["web"]}),
        with_source(train=[entry(), entry("web/train/b", bin_sha256="d" * 64)]),
        with_source(train=[entry(), entry("web/train/b", idx_sha256="d" * 64)]),
        with_source(train=[entry()]),
        with_source(heldout=[]),
    ],
)
def test_fingerprint_changes_with_the_tokens(other):
    assert other.fingerprint != manifest().fingerprint


def test_fingerprint_changes_with_the_order_of_shards():
    first, second = entry(bin_sha256="1" * 64), entry("web/train/b", bin_sha256="2" * 64)
    assert with_source(train=[first, second]).fingerprint != with_source(train=[second, first]).fingerprint


def test_fingerprint_does_not_follow_names_of_files_or_the_order_of_sources():
    renamed = with_source(train=[entry("web/train/x"), entry("web/train/y", tokens=12)])
    assert renamed.fingerprint == manifest().fingerprint
    one = manifest().sources["web"]
    assert manifest(sources={"a": one, "b": one}).fingerprint == manifest(sources={"b": one, "a": one}).fingerprint


def test_absent_manifest_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: does not exist.*python launcher\.py stage=data"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda value: value.pop("eos_id"), "eos_id"),
        (lambda value: value.update(format_version=99), "format_version"),
        (lambda value: value.update(dtype="float32"), "dtype"),
        (lambda value: value.update(extra=1), "extra"),
        (lambda value: value["sources"]["web"]["train"][0].update(tokens=-5), r"sources\.web\.train\.0\.tokens"),
        (lambda value: value["sources"]["web"].update(train=None), r"sources\.web\.train"),
        (lambda value: value.update(vocab_size=-1), "vocab_size"),
        (lambda value: value.update(vocab_size=2**40), "vocab_size"),
        (lambda value: value.update(eos_id=-1), "eos_id"),
        (lambda value: value.update(eos_id=300), "(file: )?eos_id is 300"),
        (lambda value: value.update(dtype="int32"), "(file: )?dtype is int32"),
        (lambda value: value.update(heldout_fraction=-0.5), "heldout_fraction"),
        (lambda value: value.update(heldout_fraction=float("nan")), "heldout_fraction"),
        (lambda value: value.update(heldout_fraction=float("inf")), "heldout_fraction"),
        (lambda value: value.update(sources={}), "sources"),
        (lambda value: value["sources"]["web"]["inputs"][0].update(rows=-1), r"sources\.web\.inputs\.0\.rows"),
        (
            lambda value: value["sources"]["web"]["inputs"][0].update(file="../a.parquet"),
            r"sources\.web\.inputs\.0\.file",
        ),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, named):
    value = json.loads(manifest().model_dump_json())
    change(value)
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"manifest\.json: cannot be understood \({named}"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "prefix", ["../other/a", "/etc/passwd", "web/../../a", "./web/a", "web//a", "web/a/", "", ".", "web/a\0b"]
)
def test_a_manifest_names_only_files_below_its_folder(tmp_path, prefix):
    value = json.loads(manifest().model_dump_json())
    value["sources"]["web"]["heldout"][0]["prefix"] = prefix
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"sources\.web\.heldout\.0\.prefix: .* is not a plain path below"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"sources": ' * 2000])
def test_what_is_no_manifest_is_refused(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_manifest(tmp_path)
