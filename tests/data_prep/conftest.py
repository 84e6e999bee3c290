"""A small real tokenizer, corpora and what tests of data preparation do with them."""

import functools
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from data_prep.corpus.preparation import prepare_corpus
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.data import SourceConfig

WORDS = [
    "the",
    "quick",
    "brown fox",
    "jumps",
    "over",
    "dog and then",
    "größer",
    "你好",
    "12345",
    "<|endoftext|>",
    "\n\n",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Folder of a byte-level BPE with 300 ids, `<|endoftext|>` among them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, and then the dog sleeps"] * 10, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="session")
def make_texts():
    """Function (count, seed, words): different texts for each seed, with the text of a special token among them."""

    def make(count, seed, words=40):
        rng = random.Random(seed)
        return [f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, words))) for i in range(count)]

    return make


@pytest.fixture(scope="session")
def write_shards():
    """Function (folder, {stem: column}, name of the column): writes parquet files of several row groups."""

    def write(folder, shards, name="text"):
        folder.mkdir(parents=True, exist_ok=True)
        for stem, column in shards.items():
            pq.write_table(pa.table({name: column}), folder / f"{stem}.parquet", row_group_size=100)
        return folder

    return write


@pytest.fixture
def corpus(tmp_path, make_texts, write_shards):
    """Three shards in a folder, and the texts of each by its name."""
    shards = {f"shard-{i}": make_texts(200 + 50 * i, seed=i) for i in range(3)}
    return write_shards(tmp_path / "in", shards), shards


@pytest.fixture
def prepare(tokenizer_folder):
    """Function (data_dir, path of the source `web`, ...): `prepare_corpus` with the small tokenizer."""
    load = functools.partial(Tokenizer.load, tokenizer_folder)

    def run(data_dir, path, heldout_fraction=0.1, workers=1, **options):
        ids_column = options.pop("ids_column", None)
        sources = {"web": SourceConfig(path=str(path), ids_column=ids_column)}
        return prepare_corpus(data_dir, sources, load(), load, heldout_fraction, workers, **options)

    return run


@pytest.fixture(scope="session")
def tree():
    """Function (folder): every file below it and its bytes; locks left out."""

    def read(folder):
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }

    return read
