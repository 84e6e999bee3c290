"""`stage=validate from=PATH` and `from=[A,B]`: any model on the configured domains, alone or two on the same documents."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.llama import LlamaLoss
from yxanul_nemo.export.source import load_source
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import logger
from yxanul_nemo.validation.bootstrap import comparison_table, paired_bootstrap
from yxanul_nemo.validation.domains import domain_texts
from yxanul_nemo.validation.record import result_table
from yxanul_nemo.validation.scoring import Document
from yxanul_nemo.validation.validate import score_domains, summarize


def validate_sources(config: RunConfig) -> None:
    """Score the one or two models of `from`, show tables and write them to `validation/from/` of `run.dir`.

    Each model reads the documents in its own tokens, so that models with different tokenizers compare in bits per byte.

    Raises:
        UserError: more than two, a model or a domain that cannot be read, or a context shorter than `validation.eval_len`.
    """
    sources = config.sources
    if len(sources) > 2:
        raise UserError("from", f"names {len(sources)} models", "one, or two to compare", "As in from=[A,B].")
    documents = domain_texts(config)
    results, nats = zip(*(_score(config, source, documents) for source in sources), strict=True)
    folder = config.run.folder.validation_of_others
    record: dict[str, Any] = {"models": list(results)}
    name = "-vs-".join(slug(source) for source in sources)
    if len(sources) == 2:
        differences = paired_bootstrap(
            {domain: (nats[0][domain], nats[1][domain]) for domain in documents},
            {domain: np.array([len(text.encode()) for text in texts]) for domain, texts in documents.items()},
        )
        record["bits_per_byte_difference"] = {domain: asdict(value) for domain, value in differences.items()}
        logger.info("%s less %s, bits per byte:\n%s", *sources, comparison_table(differences))
    with disk_errors(config.run.dir, "writing a validation result"):
        write_json_atomic(folder / f"{name}.json", record)
    logger.info("written: %s", folder / f"{name}.json")


def _score(
    config: RunConfig, source: Path, documents: dict[str, list[str]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The result of one model, and its nats by domain."""
    settings = config.validation
    loaded = load_source(source, device=config.parallel.device)
    if settings.eval_len > loaded.context_tokens:
        raise UserError(
            "validation.eval_len",
            f"is {settings.eval_len}",
            f"at most {loaded.context_tokens}, the context of {source}",
        )
    domains = {name: _tokenized(loaded.tokenizer, texts) for name, texts in documents.items()}
    stride = settings.stride or max(1, settings.eval_len // 2)
    nats = score_domains(
        LlamaLoss(loaded.model),
        domains,
        settings.eval_len,
        stride,
        settings.batch_tokens,
        loaded.tokenizer.eos_id,
        str(loaded.model.device),
    )
    result = summarize(domains, nats, settings.eval_len, stride)
    logger.info("%s:\n%s", loaded.described, result_table(result))
    about = {
        "model": loaded.described,
        "tokenizer_fingerprint": loaded.tokenizer.fingerprint,
        "number_format": str(loaded.model.dtype).removeprefix("torch."),
    }
    return about | result, nats


def _tokenized(tokenizer: Tokenizer, texts: list[str]) -> list[Document]:
    return [
        Document(np.asarray(ids, dtype=np.int64), len(text.encode()))
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]


def slug(source: Path) -> str:
    """A file name that tells where a model lies."""
    parts = [part for part in source.absolute().parts[-3:] if part not in ("/", "checkpoints", "export")]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))
