"""Held-out documents of the configured domains, as token ids and bytes."""

from collections.abc import Iterator

import numpy as np

from data_prep.indexed import IndexedTokens
from data_prep.manifest import CorpusManifest, load_manifest
from data_prep.tokenizer import Tokenizer
from yxanul_nemo.config.outputs import DomainConfig, ValidationConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.validation.files import empty_domain, texts
from yxanul_nemo.validation.scoring import Document


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
            raise empty_domain(name)
    return domains


def domain_texts(config: RunConfig) -> dict[str, list[str]]:
    """Name -> the same documents as text, for models with tokenizers of their own. Raises what `load_domains` does."""
    found: dict[str, list[str]] = {}
    run_tokenizer: Tokenizer | None = None
    for name, domain in config.validation.domains.items():
        if domain.source is None:
            found[name] = list(texts(config.validation, name, domain))
        else:
            manifest = load_manifest(config.data_dir)
            run_tokenizer = run_tokenizer or Tokenizer.load(config.run.dir / "tokenizer")
            found[name] = [run_tokenizer.decode(d.ids) for d in _heldout(config, manifest, run_tokenizer, domain)]
        found[name] = [text for text in found[name] if text]
        if not found[name]:
            raise empty_domain(name)
    return found


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
    documents = list(texts(config, name, domain))
    return [
        Document(np.asarray(ids, dtype=np.int64), len(text.encode()))
        for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True)
    ]
