"""Tasks that need no network: questions made of held-out text, and GSM8K and HumanEval from local files, for the harness."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pyarrow as pa
import pyarrow.parquet as pq

from yxanul_nemo.config.outputs import DomainConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.evaluation.questions import Question, make_choice, make_cloze
from yxanul_nemo.export.source import Loaded
from yxanul_nemo.log import logger
from yxanul_nemo.validation.domains import domain_texts
from yxanul_nemo.validation.files import rows

MADE = {"choice": make_choice, "cloze": make_cloze}
SMALL_SET = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai")
"""What `small` stands for: the harness's tasks that models of this size are usually shown with, each with its own data."""
COLUMNS = {"gsm8k": ("question", "answer"), "humaneval": ("prompt", "test", "entry_point")}
"""Task -> columns of its local file."""


def write_tasks(config: RunConfig, loaded: Loaded, folder: Path) -> list[str]:
    """The harness's names of tasks; those of `MADE` and `COLUMNS` are written, with data from this run and from local files.

    Args:
        config: of the run, with `evaluate` and the validation domains.
        loaded: the model, in whose context a question must have room.
        folder: for the written tasks, which the harness reads while it evaluates.

    Raises:
        UserError: a file cannot be read.
    """
    tasks: list[str] = []
    for name in config.evaluate.tasks:
        if name in MADE:
            tasks += _write_questions(config, loaded, name, folder)
        elif name in COLUMNS:
            _write_problems(config, name, folder)
            tasks.append(name)
        else:
            tasks += SMALL_SET if name == "small" else [name]
    return tasks


def _write_questions(config: RunConfig, loaded: Loaded, name: str, folder: Path) -> Iterator[str]:
    """A task for each validation domain."""
    settings = config.evaluate
    for domain, texts in domain_texts(config).items():
        made = MADE[name](texts, settings.items_per_domain, settings.seed)
        # Of a longer text the model would see another part for each choice.
        questions = [question for question in made if _fits(loaded, question)]
        if len(questions) < len(made):
            logger.warning("%s %s: %d questions are longer than the context", name, domain, len(made) - len(questions))
        if not questions:
            continue
        path = folder / f"{name}_{domain}.jsonl"
        lines = [{"texts": question.texts, "answer": question.answer} for question in questions]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        described = {
            "output_type": "multiple_choice",
            # Whole texts, because a superword may reach from the passage into the choice. What the texts share counts in all.
            "doc_to_text": "",
            "doc_to_choice": "{{texts}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        _write(folder, path.stem, path, described)
        yield path.stem


def _fits(loaded: Loaded, question: Question) -> bool:
    # EOS stands before the text, and its last token is only predicted.
    return max(map(len, loaded.tokenizer.encode_batch(question.texts))) <= loaded.context_tokens


def _write_problems(config: RunConfig, name: str, folder: Path) -> None:
    """The harness's own task on a local file, without examples before the question."""
    settings = config.evaluate
    source = settings.gsm8k_path if name == "gsm8k" else settings.humaneval_path
    template = "".join(f"{{{column}}}" for column in COLUMNS[name])
    domain = DomainConfig(path=str(source), template=template, max_documents=settings.limit)
    path = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows(config.validation, f"evaluate.{name}_path", domain))), path)
    own = Path(lm_eval.tasks.__file__).with_name(name) / f"{name}.yaml"
    without_examples = {"training_split": None, "fewshot_split": None, "num_fewshot": 0, "dataset_name": None}
    _write(folder, name, path, {"include": str(own), **without_examples})


def _write(folder: Path, name: str, data: Path, described: Mapping[str, Any]) -> None:
    """A task's file; JSON is YAML, too."""
    kind = "json" if data.suffix == ".jsonl" else "parquet"
    place = {"dataset_path": kind, "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    text = json.dumps({"task": name, **place, **described}, indent=1)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
