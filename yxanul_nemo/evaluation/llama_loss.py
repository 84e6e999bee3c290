"""The loss of each token under a Llama of transformers, without ever holding logits of [tokens, vocabulary]."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

CHUNK_LOGITS_BYTES = 256 << 20


class LlamaLoss:
    """(ids_BT, labels_BT) -> loss_BT in FP32, as `validation.scoring.LossFunction`; labels are the token after each of `ids_BT`."""

    def __init__(self, model: LlamaForCausalLM):
        self._model = model
        self._rows = max(1, CHUNK_LOGITS_BYTES // (4 * model.config.vocab_size))

    def __call__(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The loss where a label is given; 0 where it is -100."""
        # Padding stands at the end, where causal attention does not look.
        hidden_BTH = self._model.model(ids_BT, use_cache=False).last_hidden_state
        rows = zip(hidden_BTH.flatten(0, 1).split(self._rows), labels_BT.flatten().split(self._rows), strict=True)
        losses = [
            F.cross_entropy(self._model.lm_head(hidden).float(), labels, reduction="none") for hidden, labels in rows
        ]
        return torch.cat(losses).view(labels_BT.shape)
