"""All domains of a run under one model: the result that is kept in `validation/*.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch.distributed as dist

from yxanul_nemo.config.outputs import ValidationConfig
from yxanul_nemo.validation.record import surprise_ratios
from yxanul_nemo.validation.scoring import Document, LossFunction, domain_score, score_documents

type Domains = Mapping[str, Sequence[Document]]
"""Name -> held-out documents."""


def validate(
    loss_function: LossFunction,
    domains: Domains,
    config: ValidationConfig,
    *,
    eos_id: int,
    device: str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Score every domain at the fixed evaluation length and compare them.

    Args:
        group: data-parallel ranks that share the documents; every one of them gets the whole result.

    Returns:
        JSON-able, as `summarize` gives it.
    """
    stride = config.stride or max(1, config.eval_len // 2)
    nats = score_domains(loss_function, domains, config.eval_len, stride, config.batch_tokens, eos_id, device, group)
    return summarize(domains, nats, config.eval_len, stride)


def score_domains(
    loss_function: LossFunction,
    domains: Domains,
    eval_len: int,
    stride: int,
    batch_tokens: int,
    eos_id: int,
    device: str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> dict[str, np.ndarray]:
    """Name -> nats [documents] float64, the same on all ranks of `group` and for every number of them."""
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    documents = [document for of_domain in domains.values() for document in of_domain]
    mine = range(rank, len(documents), size)
    nats = np.zeros(len(documents))
    nats[list(mine)] = score_documents(
        loss_function,
        [documents[i] for i in mine],
        eos_id=eos_id,
        eval_len=eval_len,
        stride=stride,
        batch_tokens=batch_tokens,
        device=device,
    )
    if size > 1:
        parts: list[np.ndarray] = [np.empty(0)] * size
        dist.all_gather_object(parts, nats, group=group)
        nats = np.sum(parts, axis=0)
    ends = np.cumsum([len(of_domain) for of_domain in domains.values()])
    return dict(zip(domains, np.split(nats, ends[:-1]), strict=True))


def summarize(domains: Domains, nats: Mapping[str, np.ndarray], eval_len: int, stride: int) -> dict[str, Any]:
    """What the sums say.

    Returns:
        `domains` (name -> DomainScore), `mean_bits_per_byte`, surprise ratios, and the lengths in tokens that they depend on.
    """
    scores = {name: domain_score(documents, nats[name]) for name, documents in domains.items()}
    return {
        "eval_len_tokens": eval_len,
        "stride_tokens": stride,
        "mean_bits_per_byte": sum(s.bits_per_byte for s in scores.values()) / len(scores),
        "domains": {name: asdict(score) for name, score in scores.items()},
        "surprise_ratio_perplexity": surprise_ratios({n: s.perplexity for n, s in scores.items()}),
        "surprise_ratio_bits_per_byte": surprise_ratios({n: s.bits_per_byte for n, s in scores.items()}),
    }


def evenly(documents: Sequence[Document], most: int | None) -> list[Document]:
    """At most `most` of the documents, at even distances from the first on; None: all."""
    if most is None or most >= len(documents):
        return list(documents)
    return [documents[i * len(documents) // most] for i in range(most)]
