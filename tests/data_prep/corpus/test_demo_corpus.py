"""The demo's corpus: the same on every machine with the same packages, readable, without duplicates, made once."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.corpus import demo_corpus, demo_text
from data_prep.corpus.demo_corpus import collect, write_demo_corpus
from data_prep.corpus.demo_text import MAX_CHARS, MIN_CHARS, is_prose, pieces
from data_prep.corpus.find_shards import resolve_shards
from yxanul_nemo.config.data import DEMO_SOURCES
from yxanul_nemo.errors import UserError

REPOSITORY = Path(__file__).parents[3]
SIZE = 400_000


@pytest.fixture(scope="module")
def corpus():
    return collect(SIZE)


@pytest.fixture
def written(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(demo_corpus, "collect", lambda total_bytes: corpus)
    return tmp_path / "corpus", write_demo_corpus(tmp_path / "corpus", SIZE)


def test_same_text_in_other_processes_whatever_the_locale_and_hash_seed(corpus):
    program = (
        "import sys; from data_prep.corpus.demo_corpus import collect; import hashlib\n"
        f"for name, documents in collect({SIZE}).items():\n"
        "    print(name, hashlib.sha256(repr(documents).encode()).hexdigest())"
    )
    outputs = []
    for seed, locale in (("0", "C"), ("12345", "C.UTF-8")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONUTF8": "0"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
    import hashlib

    here = [f"{name} {hashlib.sha256(repr(documents).encode()).hexdigest()}" for name, documents in corpus.items()]
    assert outputs[0].splitlines() == outputs[1].splitlines() == here


def test_sources_have_their_shares(corpus):
    sizes = {name: sum(len(document.text.encode()) for document in documents) for name, documents in corpus.items()}
    assert tuple(sizes) == DEMO_SOURCES
    assert SIZE <= sum(sizes.values()) < SIZE + 3 * MAX_CHARS * 2
    for name, share in {"prose": 0.4, "reference": 0.4, "code": 0.2}.items():
        assert abs(sizes[name] / SIZE - share) < 0.05


def test_no_document_twice_and_none_tiny_or_huge(corpus):
    texts = [document.text for documents in corpus.values() for document in documents]
    assert len({" ".join(text.lower().split()) for text in texts}) == len(texts)
    assert len({" ".join(text.lower().split())[:300] for text in texts}) == len(texts)
    assert min(map(len, texts)) >= MIN_CHARS
    assert max(map(len, texts)) <= MAX_CHARS
    assert not any("\x00" in text or "\ufffd" in text for text in texts)


def test_each_source_is_what_its_name_says(corpus):
    for document in corpus["code"]:
        compile(
            document.text, document.origin, "exec", flags=0x2000
        )  # top-level await, for methods cut out of their class
    words = {name: [] for name in corpus}
    for name, documents in corpus.items():
        for document in documents:
            tokens = document.text.lower().split()
            words[name].append(sum(token in demo_text.FUNCTION_WORDS for token in tokens) / len(tokens))
    mean = {name: sum(values) / len(values) for name, values in words.items()}
    assert min(mean["prose"], mean["reference"]) > 0.2 > mean["code"]
    assert {document.origin.split("/")[0] for document in corpus["prose"]} >= {"python", "numpy", "scipy"}
    assert any(document.origin.startswith("python/topics/") for document in corpus["reference"])


def test_nothing_is_imported_to_read_it():
    program = (
        "import sys; from data_prep.corpus.demo_corpus import collect; before = set(sys.modules); collect(200_000)\n"
        "print(sorted({'torch', 'scipy', 'sklearn', 'pandas', 'networkx', 'transformers', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_hold_the_documents(written, corpus):
    _, sources = written
    for name, documents in corpus.items():
        shards = resolve_shards(sources[name].path, name)
        assert len(shards) >= 2
        rows = [row for shard in shards for row in pq.read_table(shard.paths[0]).to_pylist()]
        assert {(row["text"], row["origin"]) for row in rows} == {(d.text, d.origin) for d in documents}
        assert len(rows) == len(documents)


def test_it_is_made_once_and_again_where_a_file_is_missing(written, corpus, monkeypatch):
    folder, sources = written
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(demo_corpus, "collect", lambda total_bytes: pytest.fail("made again"))
    assert write_demo_corpus(folder, SIZE) == sources
    monkeypatch.setattr(demo_corpus, "collect", lambda total_bytes: corpus)
    (folder / "code-000.parquet").unlink()
    (folder / ".prose-000.parquet.x.tmp").write_bytes(b"left by a killed run")
    (folder / "prose-999.parquet").write_bytes(b"left by a run of another size")
    write_demo_corpus(folder, SIZE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_size_is_refused(written):
    with pytest.raises(UserError, match=r"data\.demo_bytes: 500000 differs.*data\.demo_bytes=400000"):
        write_demo_corpus(written[0], 500_000)


def test_a_damaged_record_is_named(written):
    (written[0] / "corpus.json").write_text('{"demo_bytes": ')
    with pytest.raises(UserError, match=r"corpus\.json"):
        write_demo_corpus(written[0], SIZE)


def test_a_folder_with_magic_characters_is_found(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(demo_corpus, "collect", lambda total_bytes: corpus)
    sources = write_demo_corpus(tmp_path / "run [1] *", SIZE)
    assert resolve_shards(sources["prose"].path, "k")


def test_long_text_is_cut_between_paragraphs_and_nothing_else_is_lost():
    paragraphs = [f"Paragraph {i}: " + "word " * (30 + i % 50) for i in range(200)]
    text = "\n\n".join(paragraphs)
    documents = list(pieces(text, "here"))
    assert "\n\n".join(document.text for document in documents) == text
    assert all(len(document.text) <= MAX_CHARS for document in documents)
    assert [document.origin for document in documents][:2] == ["here", "here#2"]
    assert list(pieces("too short", "here")) == []


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("This is a sentence that says what the function does with the data that it is given by the caller.", True),
        (">>> the example is not the prose that we want to have in the corpus as it is code of the kind", False),
        ("x : array_like of the values that are to be used in the computation and of the same shape as y", False),
        ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho", False),
        ("Too short to be of use.", False),
    ],
)
def test_running_text_is_told_from_the_rest(paragraph, expected):
    assert is_prose(paragraph) is expected
