"""Files of validation domains: what is read from them, and what is said of those that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.config.outputs import DomainConfig, ValidationConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.validation.files import check_domain_files, check_heldout, texts

ROWS = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(3000)]
TEMPLATE = "Q: {question}\nA: {answer}"


def domain_of(folder: Path, **domain: object) -> ValidationConfig:
    return ValidationConfig(dir=folder, eval_len=64, domains={"math": DomainConfig(**domain)})


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "other": 1} for row in ROWS]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("name", ["math.parquet", "math.jsonl"])
@pytest.mark.parametrize("most", [None, 5])
def test_rows_become_documents_by_the_template(tmp_path: Path, name: str, most: int | None) -> None:
    write(tmp_path, name)
    config = domain_of(tmp_path, path=name, template=TEMPLATE, max_documents=most)
    check_domain_files(config)
    expected = [f"Q: {row['question']}\nA: {row['answer']}" for row in ROWS]
    assert list(texts(config, "math", config.domains["math"])) == expected[:most]


def test_an_absolute_path_needs_no_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "math.jsonl")
    check_domain_files(domain_of(tmp_path / "absent", path=str(path), template=TEMPLATE))


@pytest.mark.parametrize(
    ("content", "template", "message"),
    [
        (None, "{text}", r"validation\.domains\.math\.path: .*math\.jsonl does not exist.*openai/gsm8k"),
        ("", "{text}", r"validation\.domains\.math: has no documents"),
        ("no json\n", "{text}", r"math\.jsonl: line 1 is no JSON"),
        ('{"text": "a"}\n\n\n{"text": ', "{text}", r"math\.jsonl: line 4 is no JSON"),
        ("[" * 100_000, "{text}", r"math\.jsonl: line 1 is no JSON"),
        ("[1]\n", "{text}", r"math\.jsonl: line 1 is no JSON object"),
        ("\xff\n", "{text}", r"math\.jsonl: line 1 is not UTF-8"),
        ('{"txt": "a"}\n', "{text}", r"template: names key 'text', absent in line 1.*Did you mean 'txt'\?"),
        ('{"text": "a"}\n', "{text", r"template: '{text': "),
        ('{"text": "a"}\n', "{text:d}", r"template: does not fit row 1"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, content: str | None, template: str, message: str) -> None:
    if content is not None:
        (tmp_path / "math.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        list(texts(config := domain_of(tmp_path, path="math.jsonl", template=template), "math", config.domains["math"]))
        check_domain_files(config)


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two\xc2\x85"}\n\n')
    config = domain_of(tmp_path, path="math.jsonl")
    assert list(texts(config, "math", config.domains["math"])) == ["one", "two\x85"]


def test_a_parquet_file_without_the_column_or_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "math.parquet")
    with pytest.raises(UserError, match=r"names column 'anser' of .*Did you mean 'answer'\?"):
        check_domain_files(domain_of(tmp_path, path="math.parquet", template="{anser}"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"math\.parquet: cannot be read"):
        check_domain_files(domain_of(tmp_path, path="math.parquet", template=TEMPLATE))


def test_sources_need_heldout_documents(prepared: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(f"run.dir={prepared}")
    manifest = load_manifest(config.data_dir)
    check_heldout(config.validation, manifest)
    without = manifest.sources["code"].model_copy(update={"heldout": []})
    emptied = manifest.model_copy(update={"sources": manifest.sources | {"code": without}})
    with pytest.raises(UserError, match=r"validation\.domains\.code: has no documents"):
        check_heldout(config.validation, emptied)
