"""lm-evaluation-harness on a model of ours; most of it runs only where the package is (`uv run --with 'lm-eval[hf]' pytest ...`)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.evaluation.harness import run_harness
from yxanul_nemo.export.source import Loaded, load_source

PRESENT = importlib.util.find_spec("lm_eval") is not None
TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
ABSENT = """
task: absent_data
dataset_path: json
dataset_kwargs: {data_files: {test: /nowhere/absent.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{before}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.mark.skipif(PRESENT, reason="lm-evaluation-harness is installed")
def test_without_the_package_the_way_to_it_is_said(exported: tuple[RunConfig, Checkpoint]) -> None:
    loaded = load_source(exported[0].run.dir / "export" / "hf", device="cpu")
    with pytest.raises(UserError, match=r"harness_tasks: is set, but .* not installed.*uv run --with 'lm-eval\[hf\]'"):
        run_harness(loaded, ["piqa"], None, None)


@torch.no_grad()
def likeliest(loaded: Loaded, before: str, choices: list[str]) -> int:
    """As the harness defines it: nats of the tokens that a choice adds to the text before it."""
    shared, losses = len(loaded.tokenizer.encode(before)), []
    for choice in choices:
        ids = loaded.tokenizer.encode(before + choice).tolist()
        logits_TV = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses.append(-sum(logits_TV[place - 1, ids[place]].item() for place in range(shared, len(ids))))
    return losses.index(min(losses))


@pytest.mark.skipif(not PRESENT, reason="lm-evaluation-harness is not installed")
def test_its_figures_are_those_of_a_plain_loop(exported: tuple[RunConfig, Checkpoint], tmp_path: Path) -> None:
    loaded = load_source(exported[0].run.dir / "export" / "model.nemo", device="cpu")
    questions = [
        {"before": f"The list of {i} functions:", "choices": [" items", " numbers", " words"], "answer": i % 3}
        for i in range(20)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "own.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    (tmp_path / "absent.yaml").write_text(ABSENT)
    found = run_harness(loaded, ["own_choice", "absent_data"], tmp_path, None)
    right = sum(likeliest(loaded, q["before"], q["choices"]) == q["answer"] for q in questions)
    assert found["own_choice"]["acc,none"] == pytest.approx(right / 20)
    assert "unavailable" in found["absent_data"], "the other task has its figures all the same"
    assert run_harness(loaded, ["own_choice"], tmp_path, 5)["own_choice"]["sample_len"] == 5
    with pytest.raises(UserError, match="no task 'own_chioce'"):
        run_harness(loaded, ["own_chioce"], tmp_path, None)
