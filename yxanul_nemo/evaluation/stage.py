"""`stage=evaluate`: a model at tasks, as a table and as JSON in `evaluation/` of `run.dir`."""

from typing import Any

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.evaluation.harness import accuracy_above_chance, require_harness, run_harness
from yxanul_nemo.evaluation.sources import slug
from yxanul_nemo.export.source import load_source
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.log import logger


def run_evaluate_stage(config: RunConfig) -> None:
    """Try the model of `from` (by default the run's own) at `evaluate.tasks`.

    Raises:
        UserError: several models, one that cannot be read, absent files, or a harness that is not installed.
    """
    sources = config.sources or [config.run.dir]
    if len(sources) > 1:
        raise UserError("from", f"names {len(sources)} models", "one of them")
    require_harness()
    loaded = load_source(sources[0], config.generate.checkpoint, config.parallel.device)
    tasks = run_harness(config, loaded)
    result = {
        "model": loaded.described,
        "settings": config.evaluate.model_dump(mode="json"),
        "tasks": tasks,
        "accuracy_above_chance": accuracy_above_chance(tasks),
    }
    logger.info("%s:\n%s", loaded.described, evaluation_table(result))
    path = config.run.folder.evaluation / f"{slug(sources[0])}.json"
    with disk_errors(config.run.dir, "writing an evaluation"):
        write_json_atomic(path, result)
    logger.info("written: %s", path)


def evaluation_table(result: dict[str, Any]) -> str:
    """One line per task and metric."""
    lines = [f"{'task':<24}{'metric':<32}{'questions':>10}{'value':>9}{'+-':>8}{'chance':>8}"]
    for task, found in result["tasks"].items():
        if "unavailable" in found:
            lines.append(f"{task:<24}{found['unavailable']}")
            continue
        for metric, score in found["metrics"].items():
            error = score["standard_error"]
            shown = "-" if error is None else f"{error:.3f}"
            chance = f"{found['chance']:.3f}" if metric.startswith(("acc", "exact_match", "pass")) else "-"
            lines.append(f"{task:<24}{metric:<32}{found['questions']:>10}{score['value']:>9.3f}{shown:>8}{chance:>8}")
    if (above := result["accuracy_above_chance"]) is not None:
        lines.append(f"{'mean above chance':<24}{'(accuracy - chance) / (1 - chance)':<42}{above:>9.3f}")
    return "\n".join(lines)
