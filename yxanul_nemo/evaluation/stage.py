"""`stage=evaluate`: a model at tasks, as a table and as JSON in `evaluation/` of `run.dir`."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.evaluation.generated import PassAt1, gsm8k, humaneval
from yxanul_nemo.evaluation.harness import require_harness, run_harness
from yxanul_nemo.evaluation.likelihood import answer
from yxanul_nemo.evaluation.questions import Question, make_choice, make_cloze
from yxanul_nemo.evaluation.sources import slug
from yxanul_nemo.export.source import Loaded, load_source
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import logger
from yxanul_nemo.validation.domains import domain_texts

MAKERS: dict[str, tuple[Callable[..., list[Question]], bool]] = {
    "choice": (make_choice, True),
    "cloze": (make_cloze, False),
}
"""Task -> how its questions are made, and whether choices are compared per byte."""
GENERATED: dict[str, Callable[[RunConfig, Loaded], PassAt1]] = {"gsm8k": gsm8k, "humaneval": humaneval}


def run_evaluate_stage(config: RunConfig) -> None:
    """Try the model of `from` (by default the run's own) at `evaluate.tasks` and `evaluate.harness_tasks`.

    Raises:
        UserError: several models, one that cannot be read, absent files, or a harness that is not installed.
    """
    sources = config.sources or [config.run.dir]
    if len(sources) > 1:
        raise UserError("from", f"names {len(sources)} models", "one of them")
    if config.evaluate.harness_tasks:
        require_harness()
    loaded = load_source(sources[0], config.generate.checkpoint, config.parallel.device)
    result = {"model": loaded.described, "settings": config.evaluate.model_dump(mode="json")}
    result |= evaluate(config, loaded)
    logger.info("%s:\n%s", loaded.described, evaluation_table(result))
    path = config.run.folder.evaluation / f"{slug(sources[0])}.json"
    with disk_errors(config.run.dir, "writing an evaluation"):
        write_json_atomic(path, result)
    logger.info("written: %s", path)


def evaluate(config: RunConfig, loaded: Loaded) -> dict[str, Any]:
    """`tasks`: task -> domain -> `Accuracy`, or task -> `PassAt1`; `harness`: task -> its own figures."""
    settings = config.evaluate
    tasks: dict[str, Any] = {}
    documents = domain_texts(config) if set(settings.tasks) & set(MAKERS) else {}
    for task in settings.tasks:
        if task in GENERATED:
            tasks[task] = asdict(GENERATED[task](config, loaded))
            continue
        make, per_byte = MAKERS[task]
        tasks[task] = {
            domain: asdict(answer(loaded, make(texts, settings.items_per_domain, settings.seed), per_byte))
            for domain, texts in documents.items()
        }
    harness = {}
    if settings.harness_tasks:
        harness = run_harness(loaded, settings.harness_tasks, settings.harness_folder, settings.problems)
    return {"tasks": tasks, "harness": harness}


def evaluation_table(result: dict[str, Any]) -> str:
    """One line per task and domain, and the harness's figures."""
    lines = [f"{'task':<24}{'questions':>10}{'right':>9}{'+-':>8}{'chance':>8}"]
    for task, found in result["tasks"].items():
        if "pass_at_1" in found:
            late = f"  {found['out_of_time']} out of time" if found["out_of_time"] else ""
            lines.append(
                f"{task:<24}{found['problems']:>10}{found['pass_at_1']:>9.3f}{found['standard_error']:>8.3f}{late}"
            )
            continue
        for domain, score in found.items():
            late = f"  {score['left_out']} left out" if score["left_out"] else ""
            lines.append(
                f"{f'{task} {domain}':<24}{score['questions']:>10}{score['accuracy']:>9.3f}{score['standard_error']:>8.3f}"
                f"{score['chance']:>8.3f}{late}"
            )
    for task, figures in result["harness"].items():
        shown = figures.get("unavailable") or ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        lines.append(f"{task:<24}  {shown}")
    return "\n".join(lines)
