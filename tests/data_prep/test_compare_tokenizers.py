"""Figures of tokenizers on given text."""

import io
import json
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_prep.compare_tokenizers import CONTROL, compare_tokenizers, main, print_figures, run_compare_stage
from data_prep.tokenizers.tokenizer import Tokenizer, build_tokenizer
from yxanul_nemo.config.data import TokenizerConfig
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.errors import UserError

DOCUMENTS = list(topics.values())
TEXTS = [*DOCUMENTS[::4], "", "na\u00efve \u4f60\u597d"]
RELEASED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    configs = {
        "super": TokenizerConfig(name="s", kind="train_superbpe", vocab_size=2000, transition=1200),
        "plain": TokenizerConfig(name="p", kind="train_bpe", vocab_size=2000),
    }
    for name, config in configs.items():
        build_tokenizer(config, folder / name, lambda: iter(DOCUMENTS))
    return {name: folder / name for name in configs}


@pytest.fixture
def parquet(tmp_path) -> Path:
    path = tmp_path / "given.parquet"
    pq.write_table(pa.table({"body": [*TEXTS, None]}), path)
    return path


def test_figures_are_counts_of_the_text(folders):
    tokenizers = {name: Tokenizer.load(path) for name, path in folders.items()}
    figures = compare_tokenizers(tokenizers, TEXTS, passes=1)
    assert [one.name for one in figures] == ["super", "plain"]
    for one in figures:
        tokenizer = tokenizers[one.name]
        assert one.tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
        assert one.documents == len(TEXTS)
        assert one.characters == len("".join(TEXTS))
        assert one.bytes == len("".join(TEXTS).encode())
        assert one.chars_per_token == one.characters / one.tokens
        assert one.changed_documents == 0
        assert one.encode_bytes_per_second > 0
        assert (one.fingerprint, one.vocab_size) == (tokenizer.fingerprint, 2000)


def test_documents_that_change_are_counted(folders, tmp_path):
    content = json.loads((folders["plain"] / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    [one] = compare_tokenizers({"lower": Tokenizer.load(tmp_path, "<|endoftext|>")}, TEXTS, passes=1)
    assert one.changed_documents == sum(text != text.lower() for text in TEXTS) > 0


def test_no_text_is_refused(folders):
    with pytest.raises(UserError, match="holds no text"):
        compare_tokenizers({"plain": Tokenizer.load(folders["plain"])}, ["", ""])


def test_table_compares_with_the_control(folders):
    tokenizers = {"super": Tokenizer.load(folders["super"]), CONTROL: Tokenizer.load(folders["plain"])}
    figures = compare_tokenizers(tokenizers, TEXTS, passes=1)
    output = io.StringIO()
    print_figures(figures, Console(file=output, width=200))
    assert f"{figures[0].tokens / figures[1].tokens - 1:+.1%}" in output.getvalue()
    assert f"{figures[0].tokens:,}" in output.getvalue()


def test_command_line(folders, parquet, tmp_path, capsys):
    arguments = ["--input", str(parquet), "--text-column", "body", "--passes", "1", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--tokenizer", f"mine={folders['super']}", "--control", str(folders["plain"])]) == 0
    entries = json.loads((tmp_path / "out" / "comparison.json").read_text())["tokenizers"]
    assert [entry["name"] for entry in entries] == ["mine", CONTROL]
    # Empty documents are no documents.
    assert entries[0]["documents"] == len(TEXTS) - 1
    assert entries[0]["tokens"] < entries[1]["tokens"]
    assert "mine" in capsys.readouterr().out


def test_command_line_names_what_is_wrong(folders, parquet, capsys):
    plain = str(folders["plain"])
    assert main(["--input", str(parquet), "--tokenizer", plain]) == 2
    assert "has no column 'text'" in capsys.readouterr().err
    assert main(["--input", str(parquet), "--text-column", "body", "--tokenizer", plain, plain]) == 2
    assert "'plain' is there twice" in capsys.readouterr().err
    assert main(["--input", str(parquet), "--text-column", "body", "--tokenizer", str(parquet.parent)]) == 2
    assert "expected tokenizer.json or one .model file" in capsys.readouterr().err


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released SuperBPE files are not on this machine")
def test_command_line_reads_released_folders(parquet, capsys):
    released = str(RELEASED / "superbpe_t80k")
    assert main(["--input", str(parquet), "--text-column", "body", "--tokenizer", released, "--passes", "1"]) == 0
    assert "200,005" in capsys.readouterr().out


def test_stage(tmp_path):
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS}), path)
    config = parse(
        compose(
            [
                "data=parquet",
                f"data.sources.text.path={path}",
                "data.heldout_fraction=0.2",
                f"run.dir={tmp_path / 'run'}",
                "tokenizer.vocab_size=2000",
                "tokenizer.transition=1200",
                "validation.domains=null",
                "+validation.domains.text.source=text",
            ]
        )
    )
    with pytest.raises(UserError, match=r"Make it with stage=data"):
        run_compare_stage(config)
    build_tokenizer(config.tokenizer, tmp_path / "run" / "tokenizer", lambda: iter(DOCUMENTS))
    figures = run_compare_stage(config)
    assert [one.name for one in figures] == ["demo", CONTROL]
    assert 0 < figures[0].documents < len(DOCUMENTS)
    assert figures[0].vocab_size == figures[1].vocab_size == 2000
    assert figures[0].tokens < figures[1].tokens
    assert (tmp_path / "run" / "tokenizer_comparison" / "comparison.json").is_file()
