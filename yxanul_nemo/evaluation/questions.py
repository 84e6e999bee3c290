"""Questions made of held-out text, for which nobody has to write an answer: the text has it.

Two kinds. `choice`: which of four pieces goes on a passage; the others come from other documents of the same domain. `cloze`: which
of up to four words stood in the gap; the others come from the same passage, as in the Children's Book Test (arXiv:1511.02301).
A question is a text with one place in which the choices differ, so that any tokenizer can score it, also one whose tokens
reach over the ends of words.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

PASSAGE_CHARS = 300
PIECE_CHARS = 80
AFTER_CHARS = 40
CHOICES = 4
_WORD = re.compile(r"(?<![\w'])[^\W\d_]{4,}(?![\w'])")


@dataclass(frozen=True)
class Question:
    """`before` + one of `choices` + `after`; `choices[answer]` is the text's own."""

    before: str
    choices: tuple[str, ...]
    answer: int
    after: str = ""

    @property
    def texts(self) -> list[str]:
        """The text with each choice in its place."""
        return [f"{self.before}{choice}{self.after}" for choice in self.choices]


def make_choice(documents: Sequence[str], most: int, seed: int) -> list[Question]:
    """Which piece of text goes on: at most `most` questions, spread evenly over the documents, the same for the same seed."""
    rng = random.Random(seed)
    spans = [
        (number, start)
        for number, text in enumerate(documents)
        for start in range(0, len(text) - PASSAGE_CHARS - PIECE_CHARS, PASSAGE_CHARS + PIECE_CHARS)
    ]
    questions = []
    for number, start in _evenly(spans, most):
        text = documents[number]
        cut = _end_of_word(text, start + PASSAGE_CHARS)
        own = _piece(text, cut)
        others = [
            document for other, document in enumerate(documents) if other != number and len(document) > PIECE_CHARS
        ]
        drawn = {
            _piece(o, _end_of_word(o, rng.randrange(len(o) - PIECE_CHARS))) for o in _drawn(rng, others, 2 * CHOICES)
        }
        wrong = sorted(piece for piece in drawn if piece.strip() and piece != own)[: CHOICES - 1]
        if own.strip() and len(wrong) == CHOICES - 1:
            questions.append(_question(rng, text[start:cut], own, wrong))
    return questions


def make_cloze(documents: Sequence[str], most: int, seed: int) -> list[Question]:
    """Which word stood in the gap: only words that the passage has already had, so that it says something of them."""
    rng = random.Random(seed)
    spans = [
        (number, start)
        for number, text in enumerate(documents)
        for start in range(0, len(text) - PASSAGE_CHARS - AFTER_CHARS, PASSAGE_CHARS + AFTER_CHARS)
    ]
    questions = []
    for number, start in _evenly(spans, most):
        passage = documents[number][start : start + PASSAGE_CHARS]
        # Not those that the passage's ends may have cut.
        words = [match for match in _WORD.finditer(passage) if match.start() > 0 and match.end() < len(passage)]
        seen = {match[0] for match in words}
        gaps = [m for i, m in enumerate(words) if i >= len(words) // 2 and m[0] in {w[0] for w in words[:i]}]
        if not gaps or len(seen) < CHOICES:
            continue
        gap = rng.choice(gaps)
        wrong = rng.sample(sorted(seen - {gap[0]}), CHOICES - 1)
        after = documents[number][start + gap.end() : start + gap.end() + AFTER_CHARS]
        questions.append(_question(rng, passage[: gap.start()], gap[0], wrong, after))
    return questions


def _question(rng: random.Random, before: str, own: str, wrong: Sequence[str], after: str = "") -> Question:
    choices = [own, *wrong]
    rng.shuffle(choices)
    return Question(before, tuple(choices), choices.index(own), after)


def _evenly[Item](items: Sequence[Item], most: int) -> list[Item]:
    return list(items) if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def _drawn(rng: random.Random, items: Sequence[str], count: int) -> list[str]:
    return rng.sample(items, min(count, len(items)))


def _end_of_word(text: str, start: int) -> int:
    """The first place from `start` on where a word has ended."""
    match = re.compile(r"(?<=\w)(?!\w)").search(text, start)
    return match.start() if match else start


def _piece(text: str, start: int) -> str:
    return text[start : _end_of_word(text, min(len(text), start + PIECE_CHARS))]
