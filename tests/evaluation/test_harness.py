"""lm-evaluation-harness on a model of ours: exact against the harness's own model on the exported folder, and against plain loops.

All but one of these tests need the extra `eval`, and one the package accelerate as well.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.evaluation.harness import accuracy_above_chance, require_harness, run_harness
from yxanul_nemo.evaluation.questions import make_choice
from yxanul_nemo.evaluation.stage import evaluation_table
from yxanul_nemo.export.source import Loaded, load_source
from yxanul_nemo.validation.domains import domain_texts

PRESENT = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not PRESENT, reason="lm-evaluation-harness is not installed")
TASK = {
    "task": "own_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{before}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
PAIRS = [
    ("The list of functions", " returns a number"), ("", "A text of its own"), ("def f(x):\n    return", " x"),
    ("The list of functions", " is"), ("The list of functions", " was"), ("word " * 400, "at the end"), ("two  ", "spaces"),
]  # fmt: skip


@pytest.mark.skipif(PRESENT, reason="lm-evaluation-harness is installed")
def test_without_the_package_the_way_to_it_is_said() -> None:
    with pytest.raises(UserError, match=r"harness is not installed.*uv sync --inexact --extra eval"):
        require_harness()


@pytest.fixture(scope="module")
def loaded(exported: tuple[RunConfig, Checkpoint]) -> Loaded:
    return load_source(exported[0].run.dir / "export" / "model.nemo", device="cpu")


def with_tasks(config: RunConfig, tasks: list[str], **changes: Any) -> RunConfig:
    settings = config.evaluate.model_copy(update={"tasks": tasks, **changes})
    return config.model_copy(update={"evaluate": settings})


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@needs_harness
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the harness's own model needs accelerate")
def test_it_is_exact_against_the_harness_own_model_of_the_exported_folder(
    exported: tuple[RunConfig, Checkpoint], loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from yxanul_nemo.evaluation import harness_model

    folder = str(exported[0].run.dir / "export" / "hf")
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    for batch_tokens in (1, 300, 8192):
        monkeypatch.setattr(harness_model, "BATCH_TOKENS", batch_tokens)
        ours = harness_model.HarnessModel(loaded)
        found, expected = (
            ours.loglikelihood(requests("loglikelihood", PAIRS)),
            theirs.loglikelihood(requests("loglikelihood", PAIRS)),
        )
        for (log_likelihood, is_greedy), (their_log_likelihood, their_is_greedy) in zip(found, expected, strict=True):
            assert log_likelihood == pytest.approx(their_log_likelihood, abs=2e-4) and is_greedy == their_is_greedy
        asked = [
            ("The list of functions", {"until": ["\n\n"], "max_gen_toks": 12}), ("x", {"until": ["e"], "max_gen_toks": 20}),
            ("In the same batch as the second", {"until": ["e"], "max_gen_toks": 20}),
        ]  # fmt: skip
        texts = [
            ours.generate_until(requests("generate_until", asked)),
            theirs.generate_until(requests("generate_until", asked)),
        ]
        assert texts[0] == texts[1] and any(texts[0])
    # Their tokenizer's EOS would be scored as well, as the first token of the text.
    alone = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    texts = [("A short text.",), ("a long text, of several windows; " * 300,)]
    rolled, expected = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in (ours, alone)
    )
    assert rolled == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def nats(loaded: Loaded, text: str) -> float:
    ids = [loaded.tokenizer.eos_id, *loaded.tokenizer.encode(text).tolist()]
    logits_TV = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(logits_TV[place - 1, ids[place]].item() for place in range(1, len(ids)))


@needs_harness
def test_questions_of_held_out_text_are_answered_by_the_likeliest_text(
    exported: tuple[RunConfig, Checkpoint], loaded: Loaded
) -> None:
    config = with_tasks(exported[0], ["choice", "cloze"], items_per_domain=12)
    assert "choice_prose" not in run_harness(config, loaded), "no such question fits into this model's context"
    loaded = replace(loaded, context_tokens=512)
    found = run_harness(config, loaded)
    # The other domains of this corpus are too small for choices.
    assert {"choice_prose", "cloze_prose"} <= set(found)
    questions = make_choice(domain_texts(config)["prose"], 12, 0)
    right = 0
    for question in questions:
        losses = [nats(loaded, text) for text in question.texts]
        right += losses.index(min(losses)) == question.answer
    result = found["choice_prose"]
    share = right / len(questions)
    assert (result["questions"], result["chance"]) == (len(questions), 0.25) and len(questions) > 5
    assert result["metrics"]["acc"]["value"] == pytest.approx(share)
    expected_error = math.sqrt(share * (1 - share) / (len(questions) - 1))
    assert result["metrics"]["acc"]["standard_error"] == pytest.approx(expected_error)


@needs_harness
def test_tasks_of_ones_own_absent_data_and_wrong_names(
    exported: tuple[RunConfig, Checkpoint], loaded: Loaded, tmp_path: Path
) -> None:
    questions = [
        {"before": f"The list of {i} functions:", "choices": ["items", "numbers", "words"], "answer": i % 3}
        for i in range(20)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, file in (("own_choice", tmp_path / "questions.jsonl"), ("absent_data", tmp_path / "absent.jsonl")):
        described = TASK | {"task": name, "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(described))
    config = with_tasks(exported[0], ["own_choice", "absent_data"], tasks_folder=tmp_path, limit=9)
    found = run_harness(config, loaded)
    assert found["own_choice"]["questions"] == 9 and found["own_choice"]["chance"] == pytest.approx(1 / 3)
    assert "unavailable" in found["absent_data"], "the other task has its figures all the same"
    table = evaluation_table({"tasks": found, "accuracy_above_chance": accuracy_above_chance(found)})
    assert "own_choice" in table and "absent_data" in table and "0.333" in table
    with pytest.raises(UserError, match="no task 'own_chioce'"):
        run_harness(with_tasks(exported[0], ["own_chioce"]), loaded)


@needs_harness
def test_gsm8k_is_read_from_a_local_file(
    exported: tuple[RunConfig, Checkpoint], loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yxanul_nemo.evaluation.harness_model import HarnessModel

    rows = [{"question": f"What is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(4)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_tasks(exported[0], ["gsm8k"], gsm8k_path=tmp_path / "gsm8k.jsonl")
    assert run_harness(config, loaded)["gsm8k"]["metrics"]["exact_match (strict-match)"]["value"] == 0

    def knowing(self: HarnessModel, requests: list, **_: Any) -> list[str]:
        # A model that knows three of four answers: what the grader makes of them is under test.
        assert [request.args[0] for request in requests] == [
            f"Question: What is {i} and {i}?\nAnswer:" for i in range(4)
        ]
        return [f" It is so.\n#### {2 * i if i else 7}" for i in range(4)]

    monkeypatch.setattr(HarnessModel, "generate_until", knowing)
    result = run_harness(config, loaded)["gsm8k"]
    assert result["metrics"]["exact_match (strict-match)"]["value"] == 0.75
    assert (result["questions"], result["chance"]) == (4, 0.0)


def test_code_of_a_model_runs_only_where_it_is_allowed(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="run_generated_code=true"):
        make_config("evaluate.tasks=[humaneval]")


def test_accuracy_above_chance_is_the_mean_of_centred_tasks() -> None:
    def result(chance: float, **metrics: float) -> dict[str, Any]:
        return {"chance": chance, "metrics": {name: {"value": value} for name, value in metrics.items()}}

    found = {"a": result(0.25, acc=0.25), "b": result(0.5, acc=0.1, acc_norm=1.0), "c": {"unavailable": "no network"}}
    assert accuracy_above_chance(found) == pytest.approx((0 + 1) / 2)
    assert accuracy_above_chance({"c": {"unavailable": "no network"}, "d": result(0.0, perplexity=3.0)}) is None
