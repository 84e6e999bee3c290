"""Held-out documents of the configured domains, as token ids and bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.indexed import IndexedTokens
from data_prep.manifest import CorpusManifest
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.config.outputs import DomainConfig, ValidationConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.validation.scoring import Document

WHERE_TO_GET = "C4's validation split is allenai/c4 on the Hugging Face hub, GSM8K is openai/gsm8k, HumanEval is openai/openai_humaneval."


def load_domains(config: RunConfig, manifest: CorpusManifest, tokenizer: Tokenizer) -> dict[str, list[Document]]:
    """Name -> documents with at least one token.

    Raises:
        UserError: a file is absent or unreadable, a column is missing, or a domain is empty.
    """
    domains = {}
    for name, domain in config.validation.domains.items():
        if domain.source is not None:
            documents = _heldout(config, manifest, tokenizer, domain)
        else:
            documents = _from_file(config.validation, name, domain, tokenizer)
        domains[name] = [document for document in documents if len(document.ids)]
        if not domains[name]:
            raise UserError(
                f"validation.domains.{name}", "has no documents", "at least one", "Raise data.heldout_fraction."
            )
    return domains


def _heldout(
    config: RunConfig, manifest: CorpusManifest, tokenizer: Tokenizer, domain: DomainConfig
) -> Iterator[Document]:
    count = 0
    for prefix in manifest.prefixes(config.data_dir, domain.source, "heldout"):
        shard = IndexedTokens(prefix)
        for i in range(len(shard)):
            if count == domain.max_documents:
                return
            ids = np.asarray(shard.document(i), dtype=np.int64)
            ids = ids[:-1] if len(ids) and ids[-1] == manifest.eos_id else ids
            yield Document(ids, len(tokenizer.decode(ids.tolist()).encode()))
            count += 1


def _from_file(config: ValidationConfig, name: str, domain: DomainConfig, tokenizer: Tokenizer) -> list[Document]:
    path = Path(domain.path) if Path(domain.path).is_absolute() else config.dir / domain.path
    if not path.is_file():
        raise UserError(
            f"validation.domains.{name}.path",
            f"{path} does not exist",
            "a parquet or jsonl file",
            f"Set validation.dir to the folder that has it. {WHERE_TO_GET}",
        )
    columns = [field for _, field, _, _ in Formatter().parse(domain.template) if field]
    texts = []
    for row in _rows(path, columns, name):
        if len(texts) == domain.max_documents:
            break
        texts.append(domain.template.format(**row))
    return [
        Document(np.asarray(ids, dtype=np.int64), len(text.encode()))
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]


def _rows(path: Path, columns: list[str], name: str) -> Iterator[dict[str, Any]]:
    where = f"validation.domains.{name}.template"
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(
                        where, f"names column '{column}' of {path}", fix=nearest(column, file.schema_arrow.names)
                    )
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
        else:
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    row = json.loads(line)
                    for column in columns:
                        if column not in row:
                            raise UserError(
                                where,
                                f"names key '{column}', absent in line {number} of {path}",
                                fix=nearest(column, row),
                            )
                    yield row
    except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            path, f"cannot be read ({str(error).splitlines()[0]})", "parquet, or one JSON object per line"
        ) from None
