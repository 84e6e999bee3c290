"""What children of the tests do: train phases of a prepared run, with faults at chosen places.

Heavy imports are inside the functions: the tests' own process needs only their names.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.validation.record import phase_result_path

REPO_DIR = Path(__file__).resolve().parents[2]


def train(config: RunConfig, phases: Sequence[int], callback: object = None) -> list[bool]:
    """Train those phases that are not done, as the launcher's workers would; ends with the first one that is stopped.

    Args:
        callback: is called by the training loop.

    Returns whether each was completed.
    """
    from yxanul_nemo.checkpoint.store import CheckpointStore
    from yxanul_nemo.training.loop import train_phase
    from yxanul_nemo.training.prepare import prepare_phase
    from yxanul_nemo.training.signals import StopRequest

    stop = StopRequest()
    stop.install()
    if os.environ["RANK"] == "0":
        CheckpointStore.of_run(config).clean_temporaries()
    completed = []
    for number in phases:
        if not phase_result_path(config.run.dir, number).is_file():
            callbacks = [] if callback is None else [callback]
            completed.append(train_phase(prepare_phase(config, number), stop, callbacks=callbacks))
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

    def signal_once(trainer: Any) -> None:
        if trainer.tokens_total == tokens and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)

    return train(config, phases, AfterStep(signal_once))


class AfterStep:
    """A callback that does something after each optimizer step."""

    def __init__(self, act: Callable[[Any], None]):
        self.act = act

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.act(trainer)


def train_and_signal_in_validation(config: RunConfig, phases: Sequence[int]) -> list[bool]:
    """`train`, with SIGTERM when validation begins."""
    from yxanul_nemo.training import validating

    validate = validating.validate_model

    def signal_and_validate(*arguments: object) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    validating.validate_model = signal_and_validate
    return train(config, phases)


def train_alone(config: RunConfig, phases: Sequence[int], began: Any) -> None:
    """`train` as a process that a test kills: sets the event when it begins, prints nothing, ends with 0 when all is done."""
    import torch

    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    began.set()
    assert all(train(config, phases))
    os._exit(0)


def train_and_count(config: RunConfig, phases: Sequence[int]) -> dict[str, dict[int, int]]:
    """`train`; how many lines of the project each piece of each kind of work took, by the tokens it leads to."""
    lines: dict[str, dict[int, int]] = {work: {} for work in WORK}

    def count(work: str, tokens: int, place: str) -> None:
        lines[work][tokens] = lines[work].get(tokens, 0) + 1

    assert all(train(config, phases, _on_each_line(count)))
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

    train(config, phases, _on_each_line(count))


WORK = ("step", "snapshot", "save", "validation")
"""Kinds of work that kills are aimed at; a save runs in a thread beside the others."""


def _on_each_line(act: Callable[[str, int, str], None]) -> object:
    """Call `act(work, tokens, place)` before each line of the project that is run for a piece of work.

    Its tokens are those of the run that it leads to. The result is a callback that training needs, to know them of a step.
    """
    from yxanul_nemo.training import loop
    from yxanul_nemo.training.cpu_backend import CpuBackend
    from yxanul_nemo.training.saving import CheckpointSaver

    now = threading.local()

    class BeforeStep:
        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
            now.step_tokens = trainer.tokens_total + trainer.phase.tokens_per_step

    def watch(work: str, owner: Any, name: str, tokens_of: Callable[..., int]) -> None:
        method = getattr(owner, name)

        def watched(self: object, *arguments: object, **named: object) -> object:
            now.at = work, tokens_of(self, *arguments, **named)
            try:
                return method(self, *arguments, **named)
            finally:
                now.at = None

        setattr(owner, name, watched)

    watch("step", CpuBackend, "train_step", lambda *_, **__: now.step_tokens)
    watch("snapshot", CheckpointSaver, "start", lambda saver, ledger, **_: ledger.tokens_total)
    watch("save", CheckpointSaver, "_run", lambda saver, save: save.ledger.tokens_total)
    watch("validation", loop, "validate_phase", lambda state, _: state.phase.first_token + state.phase.tokens)
    monitoring, tool = sys.monitoring, sys.monitoring.DEBUGGER_ID

    def on_start(code: CodeType, offset: int) -> object:
        if code.co_filename.startswith(f"{REPO_DIR}/yxanul_nemo/"):
            monitoring.set_local_events(tool, code, monitoring.events.LINE)
        return monitoring.DISABLE

    def on_line(code: CodeType, line: int) -> None:
        if (at := getattr(now, "at", None)) is not None:
            act(*at, f"{code.co_filename}:{line} {code.co_name}")

    monitoring.use_tool_id(tool, "faults")
    monitoring.register_callback(tool, monitoring.events.PY_START, on_start)
    monitoring.register_callback(tool, monitoring.events.LINE, on_line)
    monitoring.set_events(tool, monitoring.events.PY_START)
    return BeforeStep()


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
    from yxanul_nemo.training.flat_parameters import FlatParameters

    steps = 0
    reduce = FlatParameters.reduce_grads

    def reduce_and_poison(flat: FlatParameters) -> None:
        nonlocal steps
        reduce(flat)
        if steps in bad_steps:
            flat.parts[0].grad.view(-1)[0] = float("nan")
        steps += 1

    FlatParameters.reduce_grads = reduce_and_poison
    return refusals([config], phases)[0]


def train_and_draw(config: RunConfig, phases: Sequence[int], stop_at_tokens: int = 0) -> list[float]:
    """`train`, with a random number drawn from torch's generator in each step, to a stop if tokens for one are given."""
    import torch

    drawn: list[float] = []

    def draw(trainer: Any) -> None:
        drawn.append(float(torch.rand(1)))
        if trainer.tokens_total == stop_at_tokens:
            os.kill(os.getpid(), signal.SIGTERM)

    train(config, phases, AfterStep(draw))
    return drawn


def train_with_spikes(config: RunConfig, phases: Sequence[int], spikes: Sequence[int], stop_after: int = 0) -> None:
    """`train`, with much larger gradients in those steps of this process, from 0; stopped after so many steps, 0: never."""
    from yxanul_nemo.training.flat_parameters import FlatParameters

    steps = 0
    reduce = FlatParameters.reduce_grads

    def reduce_and_enlarge(flat: FlatParameters) -> None:
        nonlocal steps
        reduce(flat)
        if steps in spikes:
            for part in flat.parts:
                part.grad.mul_(1e4)
        steps += 1
        if steps == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    FlatParameters.reduce_grads = reduce_and_enlarge
    train(config, phases)


def train_and_hang(config: RunConfig, phases: Sequence[int], tokens: int, rank: int, logs: Path) -> None:
    """`train`, with a step of one rank that never ends; what each rank prints goes into a file."""
    from yxanul_nemo.log import configure_logging

    os.dup2(os.open(logs / os.environ["RANK"], os.O_WRONLY | os.O_CREAT), 2)
    configure_logging()

    class BeforeStep:
        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
            if trainer.tokens_total == tokens and int(os.environ["RANK"]) == rank:
                threading.Event().wait()

    train(config, phases, BeforeStep())


def train_ahead_of_a_save(config: RunConfig, phases: Sequence[int], tokens: int, steps: int) -> int:
    """`train`, with the save at `tokens` not written before that many more steps are done; how many really were."""
    from yxanul_nemo.checkpoint.snapshot import HostSnapshot

    ahead, done = threading.Event(), 0
    write = HostSnapshot.write

    def write_later(snapshot: HostSnapshot, folder: Path, rank: int) -> None:
        if f"tokens_{tokens:015d}" in folder.name:
            assert ahead.wait(60), "training waits for the save"
        write(snapshot, folder, rank)

    def count(trainer: Any) -> None:
        nonlocal done
        done += trainer.tokens_total > tokens and not ahead.is_set()
        if done == steps:
            ahead.set()

    HostSnapshot.write = write_later
    train(config, phases, AfterStep(count))
    return done


def train_on_a_full_disk(config: RunConfig, phases: Sequence[int], tokens: int, rank: int) -> str:
    """`train`, with no room for what one rank writes at `tokens`; the user's error."""
    from yxanul_nemo.checkpoint.snapshot import HostSnapshot

    write = HostSnapshot.write

    def write_without_room(snapshot: HostSnapshot, folder: Path, number: int) -> None:
        if number == rank and f"tokens_{tokens:015d}" in folder.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
        write(snapshot, folder, number)

    HostSnapshot.write = write_without_room
    return refusals([config], phases)[0]


def train_in_favoured(config: RunConfig, phases: Sequence[int], favoured: str, stop_at_tokens: int = 0) -> int:
    """`train` on a GPU with `precision=auto`, to a stop if tokens for one are given, where that format counts as a thousand times as
    fast as it was measured; how many measurements were made."""
    from yxanul_nemo.training.cuda_backend import CudaBackend

    count = 0
    measure = CudaBackend.seconds_per_micro_batch

    def measure_and_favour(backend: CudaBackend, in_bf16: bool) -> float:
        nonlocal count
        count += 1
        seconds = measure(backend, in_bf16)
        assert 0 < seconds < 1
        return seconds / 1000 if in_bf16 == (favoured == "bf16") else seconds

    CudaBackend.seconds_per_micro_batch = measure_and_favour
    if stop_at_tokens:
        assert train_until(config, phases, stop_at_tokens, signal.SIGTERM) == [False]
    else:
        assert train(config, phases) == [True]
    return count
