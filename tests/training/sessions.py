"""What children of the tests do: train phases of a prepared run, with faults at chosen places.

Heavy imports are inside the functions: the tests' own process needs only their names.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.validation.record import phase_result_path

REPO_DIR = Path(__file__).resolve().parents[2]


def train(config: RunConfig, phases: Sequence[int]) -> list[bool]:
    """Train those phases that are not done, as the launcher's workers would; ends with the first one that is stopped.

    Returns whether each was completed.
    """
    from yxanul_nemo.training.session import PhaseSession, checkpoint_store
    from yxanul_nemo.training.signals import StopRequest

    stop = StopRequest()
    stop.install()
    if os.environ["RANK"] == "0":
        checkpoint_store(config).clean_temporaries()
    completed = []
    for number in phases:
        if not phase_result_path(config.run.dir, number).is_file():
            completed.append(PhaseSession(config, number).run(stop))
            if not completed[-1]:
                break
    return completed


def refusals(configs: Sequence[RunConfig], phases: Sequence[int]) -> list[str]:
    """The user's error that each configuration ends with, or nothing."""
    errors = []
    for config in configs:
        try:
            train(config, phases)
            errors.append("")
        except UserError as error:
            errors.append(str(error))
    return errors


def train_until(config: RunConfig, phases: Sequence[int], tokens: int, number: int, rank: int = 0) -> list[bool]:
    """`train`, with a signal to one rank in the step that brings the run to `tokens`."""
    from yxanul_nemo.training.module import PhaseModule

    step = PhaseModule.training_step

    def step_and_signal(module: PhaseModule, batch: tuple, batch_index: int) -> None:
        step(module, batch, batch_index)
        if module.tokens_total == tokens and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)

    PhaseModule.training_step = step_and_signal
    return train(config, phases)


def train_and_signal_in_validation(config: RunConfig, phases: Sequence[int]) -> list[bool]:
    """`train`, with SIGTERM when validation begins."""
    from yxanul_nemo.training import session

    validate = session.validate_model

    def signal_and_validate(*arguments: object) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    session.validate_model = signal_and_validate
    return train(config, phases)


def train_and_count(config: RunConfig, phases: Sequence[int]) -> dict[str, dict[int, int]]:
    """`train`; how many lines of the project each piece of each kind of work took, by the tokens it leads to."""
    lines: dict[str, dict[int, int]] = {work: {} for work in WORK}

    def count(work: str, tokens: int, place: str) -> None:
        lines[work][tokens] = lines[work].get(tokens, 0) + 1

    _on_each_line(count)
    assert all(train(config, phases))
    return lines


def train_and_die(config: RunConfig, phases: Sequence[int], work: str, tokens: int, lines: int, note: Path) -> None:
    """`train`, killed without warning before that line of that piece of work; the place is noted."""
    left = lines

    def count(at_work: str, at_tokens: int, place: str) -> None:
        nonlocal left
        left -= (at_work, at_tokens) == (work, tokens)
        if left == 0:
            note.write_text(place)
            os.kill(os.getpid(), signal.SIGKILL)

    _on_each_line(count)
    train(config, phases)


WORK = ("step", "save", "validation")
"""Kinds of work that kills are aimed at."""


def _on_each_line(act: Callable[[str, int, str], None]) -> None:
    """Call `act(work, tokens, place)` before each line of the project that is run for a piece of work.

    Its tokens are those of the run that it leads to.
    """
    from yxanul_nemo.training.module import PhaseModule
    from yxanul_nemo.training.session import PhaseSession

    at: tuple[str, int] | None = None

    def watch(work: str, owner: type, name: str, tokens_of: Callable[..., int]) -> None:
        method = getattr(owner, name)

        def watched(self: object, *arguments: object) -> object:
            nonlocal at
            at = work, tokens_of(self, *arguments)
            try:
                return method(self, *arguments)
            finally:
                at = None

        setattr(owner, name, watched)

    watch("step", PhaseModule, "training_step", lambda module, *_: module.tokens_total + module.phase.tokens_per_step)
    watch("save", PhaseSession, "_save", lambda session, module, finished: module.tokens_total)
    watch("validation", PhaseSession, "_validate", lambda session: session.checkpoint.tokens)
    monitoring, tool = sys.monitoring, sys.monitoring.DEBUGGER_ID

    def on_start(code: CodeType, offset: int) -> object:
        if code.co_filename.startswith(f"{REPO_DIR}/yxanul_nemo/"):
            monitoring.set_local_events(tool, code, monitoring.events.LINE)
        return monitoring.DISABLE

    def on_line(code: CodeType, line: int) -> None:
        if at is not None:
            act(*at, f"{code.co_filename}:{line} {code.co_name}")

    monitoring.use_tool_id(tool, "faults")
    monitoring.register_callback(tool, monitoring.events.PY_START, on_start)
    monitoring.register_callback(tool, monitoring.events.LINE, on_line)
    monitoring.set_events(tool, monitoring.events.PY_START)


def train_and_read_back(config: RunConfig, phases: Sequence[int]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """`train`; for each phase the batches (ids_ABT, labels_ABT) of this rank, as the step got them."""
    from yxanul_nemo.training.cpu_backend import CpuBackend

    fed: list[list[tuple[np.ndarray, np.ndarray]]] = []
    step = CpuBackend.train_step

    def step_and_note(backend: CpuBackend, ids_ABT: Any, labels_ABT: Any, *rates: float, **options: Any) -> object:
        fed[-1].append((ids_ABT.numpy().copy(), labels_ABT.numpy().copy()))
        return step(backend, ids_ABT, labels_ABT, *rates, **options)

    CpuBackend.train_step = step_and_note
    for number in phases:
        fed.append([])
        assert train(config, [number]) == [True]
    return fed


def train_with_bad_gradients(config: RunConfig, phases: Sequence[int], bad_steps: Sequence[int]) -> str:
    """`train`, with a gradient that is not a number in those steps of the run, from 0; the user's error or nothing."""
    from yxanul_nemo.training.cpu_backend import CpuBackend

    steps = 0
    reduce = CpuBackend._sum_over_data_ranks

    def reduce_and_poison(backend: CpuBackend) -> None:
        nonlocal steps
        reduce(backend)
        if steps in bad_steps:
            backend.optimizer.params[0].grad.view(-1)[0] = float("nan")
        steps += 1

    CpuBackend._sum_over_data_ranks = reduce_and_poison
    return refusals([config], phases)[0]


def train_on_a_full_disk(config: RunConfig, phases: Sequence[int], tokens: int, rank: int) -> str:
    """`train`, with no room for what one rank writes at `tokens`; the user's error."""
    from yxanul_nemo.training import session

    save = session.save_shards

    def save_without_room(state: object, folder: Path, number: int) -> None:
        if number == rank and f"tokens_{tokens:015d}" in folder.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
        save(state, folder, number)

    session.save_shards = save_without_room
    return refusals([config], phases)[0]
