"""All domains of a run under one model: the result that is kept in `validation/*.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch.distributed as dist

from yxanul_nemo.config.outputs import ValidationConfig
from yxanul_nemo.validation.scoring import Document, LossFunction, domain_score, score_documents
from yxanul_nemo.validation.surprise import surprise_ratios


def validate(
    loss_function: LossFunction,
    domains: Mapping[str, Sequence[Document]],
    config: ValidationConfig,
    *,
    eos_id: int,
    device: str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Score every domain and compare them.

    Args:
        group: data-parallel ranks that share the documents; every one of them gets the whole result.

    Returns:
        JSON-able: `domains` (name -> DomainScore), `mean_bits_per_byte`, surprise ratios, and the settings they depend on.
    """
    stride = config.stride or max(1, config.eval_len // 2)
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    scores = {}
    for name, documents in domains.items():
        mine = range(rank, len(documents), size)
        nats = np.zeros(len(documents))
        nats[list(mine)] = score_documents(
            loss_function,
            [documents[i] for i in mine],
            eos_id=eos_id,
            eval_len=config.eval_len,
            stride=stride,
            batch_tokens=config.batch_tokens,
            device=device,
        )
        if size > 1:
            parts: list[np.ndarray] = [np.empty(0)] * size
            dist.all_gather_object(parts, nats, group=group)
            nats = np.sum(parts, axis=0)
        scores[name] = domain_score(documents, nats)
    return {
        "eval_len_tokens": config.eval_len,
        "stride_tokens": stride,
        "mean_bits_per_byte": sum(s.bits_per_byte for s in scores.values()) / len(scores),
        "domains": {name: asdict(score) for name, score in scores.items()},
        "surprise_ratio_perplexity": surprise_ratios({n: s.perplexity for n, s in scores.items()}),
        "surprise_ratio_bits_per_byte": surprise_ratios({n: s.bits_per_byte for n, s in scores.items()}),
    }
