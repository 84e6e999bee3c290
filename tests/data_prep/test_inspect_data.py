"""Looking into a prepared corpus."""

import functools
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_prep.corpus.preparation import prepare_corpus
from data_prep.inspect_data import document_lengths, length_bins, main, mean_seen_tokens, sample_texts, show
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.data import SourceConfig
from yxanul_nemo.errors import UserError

TEXTS = {"web": [f"web page {i} " + "and then the fox " * (i % 30) for i in range(200)], "code": ["def f(): pass"] * 20}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("inspect")
    for name, texts in TEXTS.items():
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet")
    load = functools.partial(Tokenizer.load, tokenizer_folder)
    sources = {name: SourceConfig(path=str(folder / f"{name}.parquet")) for name in TEXTS}
    return folder / "out", prepare_corpus(folder / "out", sources, load(), load, 0.0, 1), load()


def test_lengths_are_those_of_the_documents(prepared):
    data_dir, manifest, tokenizer = prepared
    lengths = document_lengths(manifest, data_dir, "web", "train")
    assert lengths.tolist() == [len(ids) + 1 for ids in tokenizer.encode_batch(TEXTS["web"])]
    assert document_lengths(manifest, data_dir, "web", "heldout").tolist() == []


def test_bins_hold_every_length_once():
    lengths = np.array([1, 2, 3, 4, 7, 8, 8, 1000, 1024])
    bins = length_bins(lengths)
    for first, end, count in bins:
        assert count == ((lengths >= first) & (lengths < end)).sum()
    assert sum(count for _, _, count in bins) == len(lengths)
    assert [first for first, _, _ in bins] == [2**i for i in range(11)]


def test_what_a_token_sees_inside_its_document_is_counted_one_by_one():
    lengths, seq_len = np.array([3, 1, 10, 2, 1, 9]), 8
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    seen = [
        sum(document_of[k] == document_of[q] for k in range(q // seq_len * seq_len, q + 1))
        for q in range(len(document_of))
    ]
    assert mean_seen_tokens(lengths, seq_len) == pytest.approx(np.mean(seen))
    assert mean_seen_tokens(np.array([4096]), 64) == 32.5


def test_samples_are_beginnings_of_documents(prepared):
    data_dir, manifest, tokenizer = prepared
    samples = sample_texts(manifest, data_dir, "web", tokenizer, 3)
    assert len(set(samples)) == 3
    for sample in samples:
        assert any(
            text.startswith(sample.removesuffix("<|endoftext|>").removesuffix(" [...]")) for text in TEXTS["web"]
        )


def test_everything_is_shown(prepared):
    data_dir, manifest, tokenizer = prepared
    out = io.StringIO()
    show(manifest, data_dir, tokenizer, 1, Console(file=out, width=100))
    shown = out.getvalue()
    total = sum(source.tokens("train") for source in manifest.sources.values())
    for name, source in manifest.sources.items():
        assert name in shown
        assert f"{source.tokens('train'):,}" in shown
        assert f"{source.tokens('train') / total:.1%}" in shown
    assert manifest.fingerprint in shown
    assert "def f(): pass" in shown


def test_another_tokenizer_is_refused(prepared, monkeypatch):
    data_dir, manifest, tokenizer = prepared
    other = manifest.model_copy(update={"tokenizer_fingerprint": "0" * 64})
    with pytest.raises(UserError, match="was made with the tokenizer 000000000000"):
        show(other, data_dir, tokenizer, 1, Console(file=io.StringIO()))


def test_command_line(prepared, tokenizer_folder, capsys):
    arguments = ["--data", str(prepared[0]), "--tokenizer", str(tokenizer_folder)]
    assert main([*arguments, "--source", "code"]) == 0
    assert "web page" not in capsys.readouterr().out
    assert main([*arguments, "--source", "cod"]) == 2
    assert "Did you mean 'code'?" in capsys.readouterr().err
    assert main(["--data", "nowhere", "--tokenizer", str(tokenizer_folder)]) == 2
