"""lm-evaluation-harness on a model of ours: tasks in, figures with standard errors and chance levels out."""

import importlib.util
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.source import Loaded
from yxanul_nemo.log import logger

NOT_FIGURES = ("alias", "name", "sample_len", "sample_count")
HOW_TO_INSTALL = "Run `uv sync --inexact --extra eval`."


def require_harness() -> None:
    """UserError if the package is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("stage", "is evaluate, and lm-evaluation-harness is not installed", fix=HOW_TO_INSTALL)


def run_harness(config: RunConfig, loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Task -> `questions`, `chance`, `metrics` (name -> `value` and `standard_error`); or `unavailable` and the reason.

    Args:
        config: whose `evaluate` names the tasks.
        loaded: the model.

    Raises:
        UserError: the package is not installed, there is no such task, or a local file cannot be read.
    """
    require_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from yxanul_nemo.evaluation.harness_model import HarnessModel
    from yxanul_nemo.evaluation.tasks import write_tasks

    settings = config.evaluate
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if settings.run_generated_code:
        # The switch of the metric itself, beside the harness's own.
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tasks = write_tasks(config, loaded, Path(scratch))
        manager = TaskManager(include_path=[str(folder) for folder in (settings.tasks_folder, scratch) if folder])
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if unknown:
            raise UserError("evaluate.tasks", f"no task '{unknown[0]}'", "names as `lm_eval ls tasks` lists them")
        model = HarnessModel(loaded)
        for task in tasks:
            try:
                results = lm_eval.simple_evaluate(
                    model=model,
                    tasks=[task],
                    task_manager=manager,
                    limit=settings.limit,
                    bootstrap_iters=100,
                    confirm_run_unsafe_code=settings.run_generated_code,
                )
            except (OSError, RuntimeError, ValueError) as error:
                # What `datasets` and the hub's client raise without network; one task without data must not cost the others.
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                logger.warning("task %s is left out: %s", task, reason)
                found[task] = {"unavailable": reason}
                continue
            assert results is not None, "this process is the only one"
            for part, figures in results["results"].items():
                found[part] = _figures(figures, results["samples"].get(part, []))
    return found


def _figures(figures: Mapping[str, Any], samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A task's metrics, and the share of right answers that guessing gives: 1 over the choices, 0 for written answers."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if key in NOT_FIGURES or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{kind}")
        label = metric if kind in ("", "none") else f"{metric} ({kind})"
        metrics[label] = {"value": value, "standard_error": error if isinstance(error, int | float) else None}
    # A question with filters has a sample for each of them.
    choices = {sample["doc_id"]: len(sample["arguments"]) for sample in samples}
    chance = statistics.fmean(1 / n if n > 1 else 0.0 for n in choices.values()) if choices else 0.0
    return {"questions": len(choices), "chance": chance, "metrics": metrics}


def accuracy_above_chance(found: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean over tasks of (accuracy - chance) / (1 - chance), as DCLM's CORE (arXiv:2406.11794) centres each of its 22 tasks.

    Accuracy is `acc_norm` where a task has it, else `acc`. 0 is guessing and 1 is everything right. None: no task has an accuracy.
    """
    shares = []
    for result in found.values():
        metrics = result.get("metrics", {})
        accuracy = (metrics.get("acc_norm") or metrics.get("acc") or {}).get("value", math.nan)
        if not math.isnan(accuracy):
            shares.append((accuracy - result["chance"]) / (1 - result["chance"]))
    return statistics.fmean(shares) if shares else None
