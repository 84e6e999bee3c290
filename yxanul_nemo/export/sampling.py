"""How the next token is chosen from a model's logits: the settings, and transformers' own processors of logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from yxanul_nemo.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """What decides about a text beside the model and the prompt."""

    max_new_tokens: int = 128
    """Most tokens to add."""
    temperature: float = 0.8
    """0 takes the most likely token each time; 1 samples from the model's own probabilities."""
    top_p: float = 0.95
    """Sample only among the most likely tokens that together have this probability (arXiv:1904.09751)."""
    top_k: int = 0
    """Sample only among so many most likely tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that stand in the text already (multiplies those below 0; arXiv:1909.05858); 1: off."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    seed: int = 0
    """The n-th text of a batch is sampled with the seed `seed + n`, counted from 0, whatever stands beside it."""

    def check(self) -> None:
        """Raise UserError for a setting that cannot be."""
        if self.max_new_tokens < 1:
            raise UserError("max_new_tokens", f"is {self.max_new_tokens}", "at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError("temperature", f"is {self.temperature}", "0 (the most likely token each time) or more")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p", f"is {self.top_p}", "above 0 and at most 1")
        if self.top_k < 0:
            raise UserError("top_k", f"is {self.top_k}", "0 (all) or more")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError("repetition_penalty", f"is {self.repetition_penalty}", "above 0; 1 is none")
        if "" in self.stop:
            raise UserError("stop", "has an empty text", "texts that end what is written")


class Chooser:
    """Chooses the next tokens of a batch.

    Args:
        texts: of the batch.
        ids_BT: the prompts' tokens, which a repetition penalty counts, too.
    """

    def __init__(self, sampling: Sampling, ids_BT: Tensor):
        texts, device = len(ids_BT), ids_BT.device
        self._samples = sampling.temperature > 0
        self._counts, self._ids_BT = sampling.repetition_penalty != 1, ids_BT
        processors = LogitsProcessorList()
        if self._counts:
            processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if self._samples:
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            draws = [self._draws(sampling.seed + text, sampling.max_new_tokens) for text in range(texts)]
            self._draws_BN = torch.stack(draws).to(device)
        self._processors, self._chosen = processors, 0

    def choose(self, logits_BV: Tensor) -> Tensor:
        """Return the next token of each text [B]."""
        # transformers names the types of tensors on the CPU, of which these are no subclasses anywhere.
        logits_BV = self._processors(self._ids_BT, logits_BV)  # type: ignore[arg-type]  # see above
        if self._samples:
            ids_B = self._sample(logits_BV)
        else:
            ids_B = logits_BV.argmax(dim=-1)
        self._chosen += 1
        if self._counts:
            self._ids_BT = torch.cat([self._ids_BT, ids_B[:, None]], dim=1)
        return ids_B

    def _sample(self, logits_BV: Tensor) -> Tensor:
        """The inverse of each distribution's sums at a number from its own generator, in FP64."""
        sums_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
        draws_B1 = self._draws_BN[:, self._chosen : self._chosen + 1] * sums_BV[:, -1:]
        # `right`: a token of probability 0 is never met.
        return torch.searchsorted(sums_BV, draws_B1, right=True).clamp(max=logits_BV.size(-1) - 1).squeeze(-1)

    @staticmethod
    def _draws(seed: int, count: int) -> Tensor:
        return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of `stops` begins in `text`; None if none is there."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def certain_length(text: str, stops: Sequence[str]) -> int:
    """Return how much of `text` no stop can begin in that what follows might complete."""
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return len(text) - held
