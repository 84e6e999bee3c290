"""Answers by likelihood, against a plain loop, and by models that know or do not know."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.evaluation.likelihood import _nats, _prepared, answer
from yxanul_nemo.evaluation.questions import Question, make_choice, make_cloze
from yxanul_nemo.export.source import Loaded, load_source
from yxanul_nemo.validation.domains import domain_texts


@pytest.fixture(scope="module")
def loaded(exported: tuple[RunConfig, Checkpoint]) -> Loaded:
    return load_source(exported[0].run.dir / "export" / "hf", device="cpu")


@torch.no_grad()
def plain_nats(loaded: Loaded, ids: list[int], first: int) -> float:
    logits_TV = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(logits_TV[place - 1, ids[place]].item() for place in range(first, len(ids)))


def questions_of(config: RunConfig, make: Callable[..., list[Question]]) -> list[Question]:
    return make(domain_texts(config)["prose"], 12, 0)


@pytest.mark.parametrize(("make", "per_byte"), [(make_choice, True), (make_cloze, False)])
def test_the_likeliest_text_is_chosen(
    exported: tuple[RunConfig, Checkpoint], loaded: Loaded, make: Callable[..., list[Question]], per_byte: bool
) -> None:
    """Each text alone and in full; a choice's own part is its loss less that of the tokens before the choices part."""
    questions = questions_of(exported[0], make)
    score = answer(loaded, questions, per_byte)
    right = 0
    for question in questions:
        losses = []
        for text, choice in zip(question.texts, question.choices, strict=True):
            ids = [loaded.tokenizer.eos_id, *loaded.tokenizer.encode(text).tolist()][-loaded.context_tokens :]
            ((cut, first), *_) = [p for p in _prepared(loaded, question) if p[0] == ids] or [(None, 0)]
            if cut is None:
                # Shorter than the longest choice's text: cut at the front like that one.
                cut, first = next(p for p in _prepared(loaded, question) if ids[-len(p[0]) :] == p[0])
            losses.append(plain_nats(loaded, cut, first) / (len(choice.encode()) if per_byte else 1))
        right += losses.index(min(losses)) == question.answer
    assert score.questions == len(questions) > 5 and score.accuracy == right / len(questions)
    assert score.chance == 0.25
    p = score.accuracy
    assert score.standard_error == pytest.approx(math.sqrt(p * (1 - p) / (len(questions) - 1)))


def test_batches_and_padding_change_nothing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [
        (torch.randint(0, 700, (n,), generator=generator).tolist(), first)
        for n, first in ((2, 1), (50, 3), (128, 127), (33, 1), (17, 16), (128, 1))
    ]
    expected = [plain_nats(loaded, ids, first) for ids, first in sequences]
    for batch_tokens in (1, 200, 100_000):
        monkeypatch.setattr("yxanul_nemo.evaluation.likelihood.BATCH_TOKENS", batch_tokens)
        assert _nats(loaded, sequences) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_the_text_is_right(loaded: Loaded) -> None:
    """Of two texts, one is the model's own most likely one; it must find it, wherever it stands."""
    from yxanul_nemo.export.generate import generate_with

    questions = []
    for number, prompt in enumerate(("The list", "def f(", "In the year", "A class of")):
        own = generate_with(loaded, prompt, 20, 0, 1.0, 0).text
        choices = ("x" * len(own), own) if number % 2 else (own, "x" * len(own))
        questions.append(Question(prompt, choices, choices.index(own)))
    score = answer(loaded, questions, per_byte=True)
    assert (score.questions, score.accuracy, score.chance) == (4, 1.0, 0.5)


def test_what_does_not_fit_into_the_context_is_cut_at_the_front_or_left_out(loaded: Loaded) -> None:
    long = "word and word " * 200
    fits = _prepared(loaded, Question(long, (" apple", " stone"), 0))
    assert max(len(ids) for ids, _ in fits) == loaded.context_tokens
    assert all(0 < first < len(ids) for ids, first in fits)
    assert _prepared(loaded, Question("a ", (long, "b"), 0)) is None
    score = answer(loaded, [Question("a ", (long, "b"), 0)], per_byte=True)
    assert (score.questions, score.left_out) == (0, 1) and math.isnan(score.accuracy)


def test_the_stage_writes_a_table_and_json(exported: tuple[RunConfig, Checkpoint], tmp_path: Path) -> None:
    import json

    from yxanul_nemo.launch.stages import run_stages

    config = exported[0]
    (tmp_path / "tokenizer").symlink_to(config.run.dir / "tokenizer")
    run = config.run.model_copy(update={"dir": tmp_path})
    run_stages(
        config.model_copy(
            update={"run": run, "stage": "evaluate", "from_": str(config.run.dir / "export" / "model.nemo")}
        )
    )
    (written,) = (tmp_path / "evaluation").iterdir()
    result = json.loads(written.read_text())
    assert set(result["tasks"]) == {"choice", "cloze"}
    for of_domain in result["tasks"].values():
        assert {"prose", "reference", "code"} == set(of_domain)
        assert all(0 <= score["accuracy"] <= 1 for score in of_domain.values() if score["questions"])
    assert result["tasks"]["choice"]["prose"]["questions"] > 5
