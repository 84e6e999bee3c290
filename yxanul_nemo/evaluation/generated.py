"""GSM8K and HumanEval by generation: the most likely answer to each problem, and how many are right (pass@1)."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yxanul_nemo.config.outputs import DomainConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.evaluation.sandbox import run_program
from yxanul_nemo.export.generate import generate_with
from yxanul_nemo.export.source import Loaded
from yxanul_nemo.validation.files import rows

GSM8K_STOPS = ("\nQuestion:",)
HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nimport ", "\nfrom ")
"""A function's end, as in the paper of HumanEval (arXiv:2107.03374, 7.1), and what else stands at the beginning of a line."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class PassAt1:
    """Share of problems that the one answer to each solves."""

    problems: int
    pass_at_1: float
    standard_error: float
    out_of_time: int = 0


def gsm8k(config: RunConfig, loaded: Loaded) -> PassAt1:
    """`Question: ...\\nAnswer:` goes on; its number after `####`, or the last one, must be that of the reference.

    Raises:
        UserError: the file cannot be read.
    """
    outcomes = [
        final_number(_continued(config, loaded, f"Question: {row['question']}\nAnswer:", GSM8K_STOPS))
        == final_number(row["answer"])
        for row in _problems(config, "gsm8k", config.evaluate.gsm8k_path, "{question}{answer}")
    ]
    return _share(outcomes)


def humaneval(config: RunConfig, loaded: Loaded, run: Callable[..., Any] = run_program) -> PassAt1:
    """The function goes on after its signature; the problem's own tests must pass.

    Raises:
        UserError: the file cannot be read.
    """
    settings = config.evaluate
    kinds = []
    for row in _problems(config, "humaneval", settings.humaneval_path, "{prompt}{test}{entry_point}"):
        body = _continued(config, loaded, row["prompt"], HUMANEVAL_STOPS)
        program = f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})\n"
        kinds.append(run(program, settings.time_limit_seconds, settings.memory_limit_mib << 20).kind)
    return _share([kind == "passed" for kind in kinds], kinds.count("out of time"))


def final_number(text: str) -> float | None:
    """What stands behind `####`, else the last number; None if there is none."""
    found = _NUMBER.findall(text.partition("####")[2]) or _NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def until(text: str, stops: tuple[str, ...]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _problems(config: RunConfig, name: str, path: Path, template: str) -> Iterator[dict[str, Any]]:
    domain = DomainConfig(path=str(path), template=template, max_documents=config.evaluate.problems)
    return rows(config.validation, f"evaluate.{name}_path", domain)


def _continued(config: RunConfig, loaded: Loaded, prompt: str, stops: tuple[str, ...]) -> str:
    """The most likely continuation; nothing where the prompt alone fills the model's context."""
    if 1 + len(loaded.tokenizer.encode(prompt)) >= loaded.context_tokens:
        return ""
    made = generate_with(loaded, prompt, config.evaluate.max_new_tokens, temperature=0.0, top_p=1.0, seed=0)
    return until(made.text, stops)


def _share(outcomes: list[bool], out_of_time: int = 0) -> PassAt1:
    n = len(outcomes)
    share = sum(outcomes) / n if n else math.nan
    error = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan
    return PassAt1(n, share, error, out_of_time)
