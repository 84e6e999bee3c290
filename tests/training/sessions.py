"""What children of the tests do: train phases of a prepared run, with faults at chosen places."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType

import numpy as np

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.training import session
from yxanul_nemo.training.cpu_backend import CpuBackend
from yxanul_nemo.training.module import PhaseModule
from yxanul_nemo.training.session import PhaseSession, checkpoint_store
from yxanul_nemo.training.signals import StopRequest
from yxanul_nemo.validation.record import phase_result_path

REPO_DIR = Path(__file__).resolve().parents[2]


def train(config: RunConfig, phases: Sequence[int]) -> list[bool]:
    """Train those phases that are not done, as the launcher's workers would; ends with the first one that is stopped.

    Returns whether each was completed.
    """
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


def train_until(config: RunConfig, phases: Sequence[int], tokens: int, number: int, rank: int = 0) -> list[bool]:
    """`train`, with a signal to one rank in the step that brings the run to `tokens`."""
    step = PhaseModule.training_step

    def step_and_signal(module: PhaseModule, batch: tuple, batch_index: int) -> None:
        step(module, batch, batch_index)
        if module.tokens_total == tokens and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)

    PhaseModule.training_step = step_and_signal
    return train(config, phases)


def train_and_count(config: RunConfig, phases: Sequence[int], work: str) -> dict[int, int]:
    """`train`; how many lines of the project each piece of a kind of work (a key of WORK) took, by the tokens it leads to."""
    lines: dict[int, int] = {}

    def count(tokens: int, place: str) -> None:
        lines[tokens] = lines.get(tokens, 0) + 1

    _on_each_line_of(work, count)
    assert all(train(config, phases))
    return lines


def train_and_die(config: RunConfig, phases: Sequence[int], work: str, tokens: int, lines: int, note: Path) -> None:
    """`train`, killed without warning before that line of that piece of work; the place is noted."""
    left = lines

    def count(at: int, place: str) -> None:
        nonlocal left
        left -= at == tokens
        if left == 0:
            note.write_text(place)
            os.kill(os.getpid(), signal.SIGKILL)

    _on_each_line_of(work, count)
    train(config, phases)


WORK: dict[str, tuple[type, str, Callable[..., int]]] = {
    "step": (PhaseModule, "training_step", lambda module, *_: module.tokens_total + module.phase.tokens_per_step),
    "save": (PhaseSession, "_save", lambda session, module, finished: module.tokens_total),
    "validation": (PhaseSession, "_validate", lambda session: session.checkpoint.tokens),
}
"""Kinds of work: the method that does it, and the tokens of the run that a call of it leads to."""


def _on_each_line_of(work: str, act: Callable[[int, str], None]) -> None:
    """Call `act(tokens, place)` before each line of the project that this work comes to."""
    owner, name, tokens_of = WORK[work]
    method = getattr(owner, name)
    at: int | None = None

    def watched(self: object, *arguments: object) -> object:
        nonlocal at
        at = tokens_of(self, *arguments)
        try:
            return method(self, *arguments)
        finally:
            at = None

    setattr(owner, name, watched)
    monitoring, tool = sys.monitoring, sys.monitoring.DEBUGGER_ID

    def on_start(code: CodeType, offset: int) -> object:
        if code.co_filename.startswith(f"{REPO_DIR}/yxanul_nemo/"):
            monitoring.set_local_events(tool, code, monitoring.events.LINE)
        return monitoring.DISABLE

    def on_line(code: CodeType, line: int) -> None:
        if at is not None:
            act(at, f"{code.co_filename}:{line} {code.co_name}")

    monitoring.use_tool_id(tool, "faults")
    monitoring.register_callback(tool, monitoring.events.PY_START, on_start)
    monitoring.register_callback(tool, monitoring.events.LINE, on_line)
    monitoring.set_events(tool, monitoring.events.PY_START)


def train_and_read_back(config: RunConfig, phases: Sequence[int]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """`train`; for each phase the batches (ids_ABT, labels_ABT) of this rank, as the step got them."""
    fed: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in phases]
    step = CpuBackend.train_step

    def step_and_note(backend: CpuBackend, ids_ABT, labels_ABT, lr: float, grad_clip: float):
        fed[trained].append((ids_ABT.numpy().copy(), labels_ABT.numpy().copy()))
        return step(backend, ids_ABT, labels_ABT, lr, grad_clip)

    CpuBackend.train_step = step_and_note
    for trained, number in enumerate(phases):  # noqa: B007 - read by the function above
        assert train(config, [number]) == [True]
    return fed


def train_with_bad_gradients(config: RunConfig, phases: Sequence[int], bad_steps: Sequence[int]) -> str:
    """`train`, with a gradient that is not a number in those steps of the run, from 0; the user's error or nothing."""
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
    save = session.save_shards

    def save_without_room(state: object, folder: Path, number: int) -> None:
        if number == rank and f"tokens_{tokens:015d}" in folder.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
        save(state, folder, number)

    session.save_shards = save_without_room
    return refusals([config], phases)[0]


def train_and_signal_in_validation(config: RunConfig, phases: Sequence[int]) -> list[bool]:
    """`train`, with SIGTERM when validation begins."""
    validate = session.validate_model

    def signal_and_validate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    session.validate_model = signal_and_validate
    return train(config, phases)


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
