"""How much text the sources of a run hold, before any of it is read: from the footers of parquet files and the beginnings of others."""

import math
from dataclasses import dataclass

import numpy as np

from data_prep.corpus.find_shards import InputShard, resolve_shards
from data_prep.corpus.open_shard import open_shard
from yxanul_nemo.config.data import ASSUMED_CHARS_PER_TOKEN, CHARS_PER_TOKEN, SourceConfig, TokenizerConfig

BYTES_PER_TOKEN = {256: 1.0, 4096: 3.8, 200_005: 6.3}
"""By the size of a SuperBPE vocabulary: bytes alone, the demo's, and `superbpe_t180k` on English web text."""
MOST_OPENED = 32
"""Shards opened at most, spread evenly; the rest is taken for like them."""


@dataclass(frozen=True)
class SourceSize:
    """What a source's files come to."""

    shards: int
    files: int
    file_bytes: int
    """On disk."""
    text_bytes: int
    """Of text, or of token ids; an estimate."""
    documents: int
    """Rows, lines or pieces of text files; an estimate."""


def source_size(name: str, source: SourceConfig) -> SourceSize:
    """Look at the files of a source that has a `path`.

    Raises:
        UserError: there are none, or one of those looked at lacks the column or cannot be read.
    """
    assert source.path is not None
    shards = resolve_shards(source.path, f"data.sources.{name}.path")
    sizes = [sum(path.stat().st_size for path in shard.paths) for shard in shards]
    step = max(1, len(shards) // MOST_OPENED)
    looked_bytes = text_bytes = documents = 0
    for shard, size in list(zip(shards, sizes, strict=True))[::step]:
        shard_bytes, shard_documents = _look(shard, source)
        looked_bytes, text_bytes, documents = looked_bytes + size, text_bytes + shard_bytes, documents + shard_documents
    factor = sum(sizes) / max(1, looked_bytes)
    return SourceSize(
        shards=len(shards),
        files=sum(len(shard.paths) for shard in shards),
        file_bytes=sum(sizes),
        text_bytes=round(text_bytes * factor),
        documents=round(documents * factor),
    )


def _look(shard: InputShard, source: SourceConfig) -> tuple[int, int]:
    """Bytes of text and documents of one shard."""
    with open_shard(shard, source.text_column, source.ids_column) as reader:
        return reader.column_bytes, reader.rows


def bytes_per_token(tokenizer: TokenizerConfig) -> tuple[float, str]:
    """Return bytes of text for a token, and how that is known."""
    if tokenizer.name in CHARS_PER_TOKEN:
        return CHARS_PER_TOKEN[tokenizer.name], "as measured on English web text"
    if tokenizer.kind == "train_superbpe" and tokenizer.vocab_size is not None:
        return bytes_per_token_of(tokenizer.vocab_size), "by the size of the vocabulary"
    return ASSUMED_CHARS_PER_TOKEN, "assumed"


def bytes_per_token_of(vocab_size: int) -> float:
    """Return the bytes of text in a token of a SuperBPE vocabulary, between those measured by logarithms."""
    return float(np.interp(math.log2(vocab_size), np.log2(list(BYTES_PER_TOKEN)), list(BYTES_PER_TOKEN.values())))
