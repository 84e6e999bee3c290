"""The factorized tied embedding: a vocab-parallel table E[vocab, rank] and a replicated projection P[hidden, rank].

Input: x = E[ids] P^T. Output: z = h P, logits = z E^T. Both factors serve both ends, so the pair costs
vocab x rank + rank x hidden parameters in all (the factorization of ALBERT, arXiv:1909.11942, with a tied head).
"""

import copy

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


class TiedProjection(MegatronModule):
    """P, replicated over tensor-parallel ranks; `forward` goes up from rank to hidden, `down` goes back for the head."""

    def __init__(self, config: TransformerConfig, rank: int):
        super().__init__(config=config)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(config.hidden_size, rank, device=device, dtype=config.params_dtype)
        )
        # Megatron sums this gradient over tensor-parallel ranks under sequence parallelism, and keeps Muon away from it.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron-core's own mark
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]  # Megatron-core's own mark

    def forward(self, x_TBR: Tensor) -> Tensor:
        """[T, B, rank] -> [T, B, hidden]."""
        return F.linear(x_TBR, self.weight)

    def down(self, h_TBH: Tensor) -> Tensor:
        """[T, B, hidden] -> [T, B, rank]."""
        return torch.matmul(h_TBH, self.weight)


class FactorizedEmbedding(LanguageModelEmbedding):
    """Megatron-core's embedding built at width `rank`, followed by the projection to the model's width."""

    def __init__(self, config: TransformerConfig, rank: int, vocab_rows: int, max_seq_len: int, tp_group: ProcessGroup):
        narrow = copy.copy(config)
        narrow.hidden_size = rank
        super().__init__(narrow, vocab_rows, max_seq_len, position_embedding_type="rope", tp_group=tp_group)
        self.config = config
        self.projection = TiedProjection(config, rank)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, tokentype_ids: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [T, B, hidden]."""
        return self.projection(super().forward(input_ids, position_ids, tokentype_ids))
