"""lm-evaluation-harness on a model of ours, as it would run on the exported folder."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from yxanul_nemo.errors import UserError
from yxanul_nemo.export.source import Loaded
from yxanul_nemo.log import logger

# Not an extra of this project: it needs another version of python-dateutil, whose text is in the demo's corpus.
HOW_TO_INSTALL = "Run the same command as `uv run --with 'lm-eval[hf]' python launcher.py ...`."


def require_harness() -> None:
    """UserError if the package is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.harness_tasks", "is set, but lm-evaluation-harness is not installed", fix=HOW_TO_INSTALL
        )


def run_harness(loaded: Loaded, tasks: list[str], folder: Path | None, limit: int | None) -> dict[str, dict[str, Any]]:
    """Task -> its figures; or `unavailable` and the reason, where its data cannot be had.

    Args:
        folder: with tasks of one's own, or None.
        limit: most documents of each task, or None.

    Raises:
        UserError: the package is not installed, or there is no such task.
    """
    require_harness()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError("evaluate.harness_tasks", f"no task '{unknown[0]}'", "names as `lm_eval ls tasks` lists them")
    with tempfile.TemporaryDirectory() as scratch:
        loaded.tokenizer.save(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(scratch)
    model = HFLM(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        max_length=loaded.context_tokens,
        # Every text stood behind the end of another in training.
        prefix_token_id=loaded.tokenizer.eos_id,
    )
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        try:
            results = lm_eval.simple_evaluate(
                model=model, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0
            )
        except (OSError, RuntimeError, ValueError) as error:
            # What `datasets` and the hub's client raise without network; one task without data must not cost the others.
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            logger.warning("harness task %s is left out: %s", task, reason)
            found[task] = {"unavailable": reason}
            continue
        for name, figures in results["results"].items():
            found[name] = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    return found
