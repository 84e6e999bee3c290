"""Questions answered by likelihood: the choice whose text the model finds most likely."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yxanul_nemo.evaluation.questions import Question
from yxanul_nemo.export.llama import LlamaLoss
from yxanul_nemo.export.source import Loaded
from yxanul_nemo.validation.scoring import IGNORE_INDEX, PAD_MULTIPLE

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers."""

    questions: int
    accuracy: float
    standard_error: float
    chance: float
    """What guessing gives."""
    left_out: int = 0
    """Questions longer than the model's context."""


def answer(loaded: Loaded, questions: Sequence[Question], per_byte: bool) -> Accuracy:
    """Score all choices in their whole text.

    Args:
        per_byte: compare nats per byte of the choice, for choices of different length; else of the whole text.
    """
    kept: list[Question] = []
    sequences: list[tuple[list[int], int]] = []
    for question in questions:
        prepared = _prepared(loaded, question)
        if prepared is not None:
            kept.append(question)
            sequences += prepared
    nats = iter(_nats(loaded, sequences))
    right = 0
    for question in kept:
        losses = [next(nats) for _ in question.choices]
        if per_byte:
            losses = [loss / len(choice.encode()) for loss, choice in zip(losses, question.choices, strict=True)]
        right += losses.index(min(losses)) == question.answer
    n = len(kept)
    share = right / n if n else math.nan
    return Accuracy(
        questions=n,
        accuracy=share,
        standard_error=math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan,
        chance=sum(1 / len(question.choices) for question in kept) / n if n else math.nan,
        left_out=len(questions) - n,
    )


def _prepared(loaded: Loaded, question: Question) -> list[tuple[list[int], int]] | None:
    """For each choice, EOS and its text's ids, and the first place that the choices do not share; None if that is too long.

    What they share has the same likelihood in all. Tokens that do not fit into the context are left out at the front.
    """
    eos_id = loaded.tokenizer.eos_id
    ids = [[eos_id, *tokens.tolist()] for tokens in loaded.tokenizer.encode_batch(question.texts)]
    shared = next((i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), min(map(len, ids)))
    over = max(len(of_choice) for of_choice in ids) - loaded.context_tokens
    if over > 0:
        if over >= shared:
            return None
        ids = [of_choice[over:] for of_choice in ids]
        shared -= over
    return [(of_choice, max(1, shared)) for of_choice in ids]


@torch.inference_mode()
def _nats(loaded: Loaded, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
    """Nats of each sequence from its given place on."""
    loss_function, device = LlamaLoss(loaded.model), loaded.model.device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    found = [0.0] * len(sequences)
    while order:
        batch: list[int] = []
        while order and (len(batch) + 1) * len(sequences[order[0]][0]) <= max(
            BATCH_TOKENS, len(sequences[order[0]][0])
        ):
            batch.append(order.pop(0))
        length = -(-(len(sequences[batch[-1]][0]) - 1) // PAD_MULTIPLE) * PAD_MULTIPLE
        ids_BT = torch.full((len(batch), length), loaded.tokenizer.eos_id)
        labels_BT = torch.full((len(batch), length), IGNORE_INDEX)
        for row, i in enumerate(batch):
            tokens, first = sequences[i]
            ids_BT[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            labels_BT[row, first - 1 : len(tokens) - 1] = torch.tensor(tokens[first:])
        sums = loss_function(ids_BT.to(device), labels_BT.to(device)).double().sum(dim=1).tolist()
        for i, nats in zip(batch, sums, strict=True):
            found[i] = nats
    return found
