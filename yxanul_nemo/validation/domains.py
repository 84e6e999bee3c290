"""Held-out documents of the configured domains, as token ids and bytes."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus.indexed import IndexedTokens
from data_prep.corpus.manifest import CorpusManifest, load_manifest
from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.outputs import DomainConfig, ValidationConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.validation.files import empty_domain, file_of, texts
from yxanul_nemo.validation.scoring import Document
from yxanul_nemo.validation.token_cache import TokenCache


def load_domains(
    config: RunConfig, manifest: CorpusManifest, tokenizer: Callable[[], Tokenizer]
) -> dict[str, list[Document]]:
    """Name -> documents with at least one token; text is tokenized where the run's folder does not hold its tokens yet.

    Args:
        tokenizer: gives the one of `manifest.tokenizer_fingerprint`; called only if something is to be tokenized.

    Raises:
        UserError: a file is absent or unreadable, a column is missing, or a domain is empty.
    """
    cache, domains = TokenCache(config.run.folder.validation_documents), {}
    for name, domain in config.validation.domains.items():
        made_from = {
            "tokenizer": manifest.tokenizer_fingerprint,
            "template": domain.template,
            "max_documents": domain.max_documents,
        }
        if domain.source is not None:
            made_from |= {"corpus": manifest.fingerprint, "source": domain.source}
            documents = cache.documents(made_from, partial(_heldout, config, manifest, tokenizer, domain))
        else:
            made_from |= _identity(file_of(config.validation, f"validation.domains.{name}.path", domain))
            documents = cache.documents(made_from, partial(_from_file, config.validation, name, domain, tokenizer))
        domains[name] = [document for document in documents if len(document.ids)]
        if not domains[name]:
            raise empty_domain(name)
    return domains


def _identity(file: Path) -> dict[str, Any]:
    """What tells one state of a file from another without reading it."""
    state = file.stat()
    return {"file": str(file.resolve()), "size_bytes": state.st_size, "changed_ns": state.st_mtime_ns}


def domain_texts(config: RunConfig) -> dict[str, list[str]]:
    """Name -> the same documents as text, for models with tokenizers of their own. Raises what `load_domains` does."""
    found: dict[str, list[str]] = {}
    run_tokenizer: Tokenizer | None = None
    for name, domain in config.validation.domains.items():
        if domain.source is None:
            found[name] = list(texts(config.validation, name, domain))
        else:
            manifest = load_manifest(config.data_dir)
            run_tokenizer = run_tokenizer or Tokenizer.load(config.run.folder.tokenizer)
            found[name] = [run_tokenizer.decode(ids) for ids in _heldout_ids(config, manifest, domain)]
        found[name] = [text for text in found[name] if text]
        if not found[name]:
            raise empty_domain(name)
    return found


def _heldout_ids(config: RunConfig, manifest: CorpusManifest, domain: DomainConfig) -> Iterator[np.ndarray]:
    assert domain.source is not None, "a domain without a file"
    count = 0
    for prefix in manifest.prefixes(config.data_dir, domain.source, "heldout"):
        shard = IndexedTokens(prefix)
        for i in range(len(shard)):
            if count == domain.max_documents:
                return
            ids = np.asarray(shard.document(i), dtype=np.int64)
            yield ids[:-1] if len(ids) and ids[-1] == manifest.eos_id else ids
            count += 1


def _heldout(
    config: RunConfig, manifest: CorpusManifest, tokenizer: Callable[[], Tokenizer], domain: DomainConfig
) -> list[Document]:
    decode = tokenizer().decode
    return [Document(ids, len(decode(ids.tolist()).encode())) for ids in _heldout_ids(config, manifest, domain)]


def _from_file(
    config: ValidationConfig, name: str, domain: DomainConfig, tokenizer: Callable[[], Tokenizer]
) -> list[Document]:
    documents = list(texts(config, name, domain))
    return [
        Document(np.asarray(ids, dtype=np.int64), len(text.encode()))
        for text, ids in zip(documents, tokenizer().encode_batch(documents), strict=True)
    ]
