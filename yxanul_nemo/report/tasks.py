"""What `stage=evaluate` found, as tables."""

from collections.abc import Iterator
from typing import Any

from yxanul_nemo.report.gather import Run
from yxanul_nemo.report.page import Section, Table

NOTE = (
    "Through lm-evaluation-harness; ± is the standard error over questions, chance what guessing gives. Mean above chance is the mean "
    "of (accuracy - chance) / (1 - chance)."
)


def tasks_sections(run: Run) -> Iterator[Section]:
    """One section with a table for each model that was evaluated; none where no model was."""
    tables = [_table(result) for result in run.evaluations]
    if tables:
        yield Section("tasks", "Tasks", NOTE, (), tables)


def _table(result: dict[str, Any]) -> Table:
    rows = []
    for task, found in result["tasks"].items():
        if "unavailable" in found:
            rows.append([task, "-", "-", "not available", "-"])
        for metric, score in found.get("metrics", {}).items():
            error = score["standard_error"]
            value = f"{score['value']:.3f}" if error is None else f"{score['value']:.3f} ± {error:.3f}"
            rows.append([task, metric, f"{found['questions']:,}", value, f"{found['chance']:.3f}"])
    above = result["accuracy_above_chance"]
    total = ["mean above chance", "", "", f"{above:.3f}", ""] if above is not None else ()
    return Table(["task", "metric", "questions", "value", "chance"], rows, total, result["model"], left=(0, 1))
