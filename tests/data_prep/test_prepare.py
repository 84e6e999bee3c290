"""Preparation as a whole: what is written from which documents, the stage and the command line."""

import functools
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.corpus import encode
from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import load_manifest
from data_prep.corpus.preparation import prepare_corpus
from data_prep.prepare import describe, main, run_data_stage, training_texts
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.errors import UserError

REPOSITORY = Path(__file__).parents[2]


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


def test_output_does_not_depend_on_processes_chunks_or_order_of_work(tmp_path, corpus, prepare, monkeypatch, tree):
    folder, _ = corpus
    prepare(tmp_path / "one", folder, workers=1)
    # Two shards go to one worker each, the third to both.
    monkeypatch.setattr("data_prep.corpus.pool.PIECE_CHARS", 1000)
    prepare(tmp_path / "two", folder, workers=2, process_min_bytes=0)
    monkeypatch.setattr(
        "data_prep.corpus.pool.prepare_shard", lambda *arguments: encode.prepare_shard(*arguments[:3], 500)
    )
    prepare(tmp_path / "small", folder, workers=1)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "small")


def test_split_of_a_document_depends_on_its_text_alone(tmp_path, corpus, prepare, tokenizer_folder, write_shards):
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


def b2sum_64(document: bytes) -> int:
    """BLAKE2b with a digest of 64 bits as GNU coreutils' b2sum computes it, read as a big-endian number."""
    told = subprocess.run(["b2sum", "--length=64"], input=document, capture_output=True, check=True).stdout
    return int(told.split()[0], 16)


@pytest.mark.parametrize("column", ["text", "ids"])
def test_the_split_is_the_one_that_the_manifests_rule_tells(
    tmp_path, make_texts, prepare, tokenizer_folder, write_shards, column
):
    tokenizer = Tokenizer.load(tokenizer_folder)
    texts = make_texts(60, seed=3)
    ids = [tokenizer.encode(text).tolist() for text in texts]
    by_column = {"text": texts, "ids": pa.array([[*document, tokenizer.eos_id] for document in ids])}
    folder = write_shards(tmp_path / "in", {"x": by_column[column]}, name=column)
    manifest = prepare(tmp_path / "out", folder, heldout_fraction=0.3, ids_column="ids" if column == "ids" else None)
    assert "BLAKE2b of the document with a digest size of 8 bytes" in manifest.split_rule
    documents = {
        "text": [text.encode() for text in texts],
        "ids": [struct.pack(f"<{len(document)}q", *document) for document in ids],
    }[column]
    below = [text for text, document in zip(texts, documents, strict=True) if b2sum_64(document) < 0.3 * 2**64]
    assert decoded(tmp_path / "out", manifest, "heldout", tokenizer) == below
    assert 5 < len(below) < 40


def test_ids_are_taken_over_and_give_the_same_corpus_as_their_text(
    tmp_path, corpus, prepare, tokenizer_folder, write_shards
):
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
def test_ids_outside_the_vocabulary_are_refused(tmp_path, prepare, wrong, write_shards):
    folder = write_shards(tmp_path / "in", {"x": pa.array([[1, 2], [3, wrong]])}, name="ids")
    with pytest.raises(
        UserError, match=rf"x\.parquet: column 'ids' has token id {wrong}; expected ids from 0 to 2\d\d,"
    ):
        prepare(tmp_path / "out", folder, ids_column="ids")
    assert list((tmp_path / "out").rglob("*.bin")) == []


def test_skipped_rows_are_counted_in_the_manifest(tmp_path, prepare, write_shards):
    column = pa.array([b"good one", None, b"", b"\xff", b"good two"], pa.binary()).view(pa.string())
    folder = write_shards(tmp_path / "in", {"x": column})
    manifest = prepare(tmp_path / "out", folder, heldout_fraction=0)
    entry = manifest.sources["web"].inputs[0]
    assert (entry.rows, entry.skipped_null, entry.skipped_empty, entry.skipped_not_utf8) == (5, 1, 1, 1)
    assert manifest.sources["web"].documents("train") == 2
    assert "3 rows skipped (1 null, 1 empty, 1 not UTF-8)" in describe(manifest)[0]


def test_a_shard_that_is_a_copy_is_named(tmp_path, prepare, make_texts, write_shards, caplog):
    shards = {"a": make_texts(30, seed=1), "b": make_texts(30, seed=2)}
    prepare(tmp_path / "out", write_shards(tmp_path / "in", shards))
    assert "is a copy of" not in caplog.text
    prepare(tmp_path / "twice", write_shards(tmp_path / "copies", shards | {"c": shards["a"]}))
    assert "web/c.parquet is a copy of web/a.parquet" in caplog.text


def test_a_source_without_documents_is_refused(tmp_path, prepare, write_shards):
    folder = write_shards(tmp_path / "in", {"x": pa.array(["", None])})
    with pytest.raises(
        UserError,
        match=r"data\.sources\.web: has no document to train on: 2 rows in 1 shards, 2 rows skipped \(1 null, 1 empty\)",
    ):
        prepare(tmp_path / "out", folder)


def test_a_long_document_is_one_document(tmp_path, prepare, tokenizer_folder, write_shards):
    text = "the quick brown fox " * 200_000 + "9" * 100_000
    folder = write_shards(tmp_path / "in", {"x": ["short", text]})
    manifest = prepare(tmp_path / "out", folder, heldout_fraction=0)
    read = IndexedTokens(manifest.prefixes(tmp_path / "out", "web", "train")[0])
    assert len(read) == 2
    assert Tokenizer.load(tokenizer_folder).decode(read.document(1)[:-1]) == text


# Text for the tokenizer


def test_training_text_leaves_out_what_is_held_out_and_shares_bytes_between_sources(
    tmp_path, prepare, tokenizer_folder, make_texts, write_shards
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


def test_the_stage_makes_corpus_tokenizer_and_tokens_once(tmp_path, tree):
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
    for path in folder.iterdir():
        path.unlink()
    assert main([*arguments, "--verify"]) == 0
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
