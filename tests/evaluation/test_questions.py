"""Questions made of text: the right choice is the text's own, and nothing else gives it away."""

import random

import pytest

from yxanul_nemo.evaluation.questions import CHOICES, Question, make_choice, make_cloze

WORDS = (
    "river", "stone", "garden", "window", "letter", "number", "paper", "morning", "castle", "forest", "silver", "golden", "winter"
)  # fmt: skip


def documents(count: int = 30, words: int = 200) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=words)) + f" number {i}." for i in range(count)]


@pytest.mark.parametrize("make", [make_choice, make_cloze])
def test_the_right_choice_is_what_the_text_has(make) -> None:
    texts = documents()
    questions = make(texts, 50, seed=1)
    assert len(questions) == 50
    whole = "\n".join(texts)
    for question in questions:
        assert question.texts[question.answer] in whole
        assert len(set(question.choices)) == len(question.choices) == CHOICES
        assert question.before.strip()
    assert {question.answer for question in questions} == set(range(CHOICES)), "its place says nothing"
    assert make(texts, 50, seed=1) == questions != make(texts, 50, seed=2)


def test_pieces_end_with_words_and_come_from_other_documents() -> None:
    texts = [f"{i:03} ".join(document.split(" ")[:-2]) for i, document in enumerate(documents())]
    for question in make_choice(texts, 40, seed=0):
        numbers = {piece.split()[0][-3:] for piece in question.choices}
        assert len(numbers) == CHOICES, "one of each document"
        assert not question.after
        lengths = [len(choice) for choice in question.choices]
        assert max(lengths) - min(lengths) < 20


def test_gaps_are_words_that_the_passage_has_had() -> None:
    for question in make_cloze(documents(), 40, seed=0):
        right = question.choices[question.answer]
        assert f" {right} " in f" {question.before} "
        assert all(choice in WORDS for choice in question.choices)
        assert question.after


def test_little_text_gives_few_questions_or_none() -> None:
    assert make_choice(["short"], 10, 0) == make_cloze(["short"], 10, 0) == make_choice([], 10, 0) == []
    assert make_cloze(["word " * 200], 10, 0) == [], "there is nothing to choose from"


def test_a_text_has_each_choice_in_its_place() -> None:
    assert Question("a ", ("b", "c"), 1, " d").texts == ["a b d", "a c d"]
