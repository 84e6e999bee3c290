"""A Llama whose tied embedding is a pair of small matrices, for transformers (`trust_remote_code=True`).

This file travels in the model's folder and stands alone. The embedding of a token is E[token] P^T; logits are (h P) E^T, so
one pair of matrices, E [vocabulary, rank] and P [hidden, rank], serves both ends.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class YxanulConfig(LlamaConfig):
    """LlamaConfig with the embedding's rank."""

    model_type = "yxanul"

    def __init__(self, embedding_rank: int = 128, **llama: Any):
        super().__init__(**llama)
        self.embedding_rank = embedding_rank


class FactorizedEmbedding(nn.Module):
    """ids [B, T] -> [B, T, hidden]; `head` goes the other way."""

    def __init__(self, config: YxanulConfig):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.embedding_rank)
        self.projection = nn.Linear(config.embedding_rank, config.hidden_size, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """E[ids] P^T."""
        return self.projection(self.table(ids_BT))

    def head(self, hidden_BTH: Tensor) -> Tensor:
        """(h P) E^T, logits [B, T, vocabulary]."""
        return F.linear(torch.matmul(hidden_BTH, self.projection.weight), self.table.weight)


class FactorizedHead(nn.Module):
    """The embedding's other end; it has no parameters of its own."""

    def __init__(self, embedding: FactorizedEmbedding):
        super().__init__()
        # In a tuple, so that it is not registered (and saved) a second time.
        self.embedding = (embedding,)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Logits [B, T, vocabulary]."""
        return self.embedding[0].head(hidden_BTH)


class YxanulForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with both ends replaced."""

    config_class = YxanulConfig
    _tied_weights_keys = None  # type: ignore[assignment]  # transformers means by None that nothing is tied

    def __init__(self, config: YxanulConfig):
        super().__init__(config)
        self.model.embed_tokens = FactorizedEmbedding(config)
        self.lm_head = FactorizedHead(self.model.embed_tokens)
        self.post_init()
