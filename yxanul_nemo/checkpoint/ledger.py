"""The token ledger: what a run has consumed, in tokens, in all, by phase and by source. It travels in every checkpoint.

Every sum in it is kept twice and compared whenever a ledger is made or read, so that a position in the data is never
guessed from steps or samples. A ledger is immutable; `start_phase`, `consume` and the others return a new one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from yxanul_nemo.errors import UserError
from yxanul_nemo.files import read_bounded, write_text_atomic
from yxanul_nemo.stored import Stored, first_problem

MAX_LEDGER_BYTES = 16 << 20

DOCUMENT_ORDER = "documents one after another"
"""The order of runs that were begun with version 0.1.0, which cannot be read any more."""

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PhasePlan(Stored):
    """What the curriculum says about one phase, as it is trained: after scaling and rounding to whole steps."""

    seq_len: int = Field(ge=1)
    """Length of the windows, in tokens."""
    tokens_per_step: int = Field(ge=1)
    """Tokens in one optimizer step over all ranks."""
    planned_tokens: int = Field(ge=1)
    """Tokens of the whole phase, a multiple of `tokens_per_step`."""
    lr_scale: Positive
    """Factor on the learning-rate schedule."""
    grad_clip: Positive
    """Largest norm of the gradient."""
    blend: dict[str, Share] | None = None
    """Share of each source; None: in proportion to their sizes."""

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        if self.tokens_per_step % self.seq_len:
            raise ValueError(f"tokens_per_step={self.tokens_per_step} is not a multiple of seq_len={self.seq_len}")
        if self.planned_tokens % self.tokens_per_step:
            raise ValueError(
                f"planned_tokens={self.planned_tokens} is not a multiple of tokens_per_step={self.tokens_per_step}"
            )
        return self


class ReadingRecord(Stored):
    """What a phase was planned to read of the sources, from one of its windows on."""

    first_window: Count
    """Window of the phase, from 0, from which this holds."""
    end_window: int = Field(ge=1)
    """Windows of the whole phase."""
    shares: dict[str, Share]
    """Share of each source in the windows, summing to 1."""


class PhaseRecord(PhasePlan):
    """One phase that was begun: its plan and what came of it."""

    index: int = Field(ge=1)
    """Number of the phase, counted from 1."""
    consumed_tokens: Count = 0
    """Tokens trained on in this phase."""
    tokens_per_source: dict[str, Count] = Field(default_factory=dict)
    """The same by source."""
    micro_batch_size: int = Field(ge=1)
    """Windows per micro-batch and rank, as last trained."""
    world_size: int = Field(ge=1)
    """Processes, as last trained."""
    adapted_blend: dict[str, Share] | None = None
    """Shares that the phase is trained with where `curriculum.adapt_blend` moved them from `blend`; None: `blend` itself."""
    precision: str | None = None
    """Number format of the layers, as last trained: with `precision=auto` the one chosen. None: not recorded."""
    readings: tuple[ReadingRecord, ...] = ()
    """What the phase was planned to read, first as it began and then after each change of its tokens or blend. They fix the order of its
    windows."""

    @model_validator(mode="after")
    def _sums(self) -> Self:
        consumed, of_sources = self.consumed_tokens, sum(self.tokens_per_source.values())
        if of_sources != consumed:
            raise ValueError(f"phase {self.index}: sources add up to {of_sources}, not {consumed} tokens")
        if consumed % self.tokens_per_step:
            raise ValueError(f"phase {self.index}: {consumed} tokens are no whole steps of {self.tokens_per_step}")
        if consumed > self.planned_tokens:
            raise ValueError(f"phase {self.index}: {consumed} of only {self.planned_tokens} tokens consumed")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps taken in this phase, skipped ones included."""
        return self.consumed_tokens // self.tokens_per_step

    @property
    def finished(self) -> bool:
        """Whether all planned tokens are consumed."""
        return self.consumed_tokens == self.planned_tokens


class Expected(Stored):
    """What the run that wants to resume is configured to be; compared with the ledger of a checkpoint."""

    corpus_fingerprint: str
    tokenizer_fingerprint: str
    model_fingerprint: str
    config_fingerprint: str
    """Of those settings outside the curriculum that decide the training, such as the optimizer's; not of logging."""
    document_mask: bool = False
    """Whether attention stays inside documents."""
    window_order: str
    """How windows are ordered (`DataConfig.window_order`)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    phases: tuple[PhasePlan, ...]
    """The whole curriculum."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Key -> value of everything that decides training, phases to come included (`identity.settings_of`)."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of each source's tokens."""


class ChangeRecord(Stored):
    """One setting that was changed in the life of a run."""

    key: str
    """As the command line has it."""
    before: JsonValue
    now: JsonValue
    at_tokens: Count
    """Tokens of the run from which the new value holds."""


class LineageRecord(Stored):
    """The checkpoint of another run that this one began from."""

    run: str
    """Name of that run's folder."""
    at_tokens: Count
    """Tokens that had been consumed there, and with which this run began."""
    digest: str
    """Of that checkpoint's manifest."""


IDENTITY = tuple(name for name in Expected.model_fields if name != "phases")
"""Fields that say which run it is; a ledger has them, too."""


class Ledger(Stored):
    """Position and history of a run.

    Raises:
        pydantic.ValidationError: (a ValueError) sums, numbers of phases or types do not fit together.
    """

    format: Literal["yxanul-ledger"] = "yxanul-ledger"
    format_version: Literal[1] = 1
    tokens_total: Count = 0
    """Tokens consumed by the run."""
    phase: Count = 0
    """Number of the phase being trained, counted from 1; 0 before the first."""
    phase_tokens: Count = 0
    """Tokens consumed in that phase."""
    steps_total: Count = 0
    """Optimizer steps of the run, skipped ones included."""
    skipped_steps: Count = 0
    """Steps whose update was not applied; their tokens count as consumed."""
    tokens_per_source: dict[str, Count] = Field(default_factory=dict)
    """`tokens_total` by source."""
    phases: tuple[PhaseRecord, ...] = ()
    """One record for each phase begun; the last one is being trained or has just ended."""
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    model_fingerprint: str
    config_fingerprint: str
    document_mask: bool = False
    """Whether attention stays inside documents; ledgers from before it could are of whole windows."""
    window_order: str = DOCUMENT_ORDER
    """How windows are ordered; ledgers from before there was a choice are of documents in random order, one window after another."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Whose moments the checkpoint has; ledgers from before there was a choice are of AdamW."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Key -> value of everything that decides training; empty in ledgers from before they were kept."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of each source's tokens."""
    changes: tuple[ChangeRecord, ...] = ()
    """What was changed in this run's life, oldest first."""
    lineage: tuple[LineageRecord, ...] = ()
    """Runs that this one was branched from, the nearest last."""
    notes: tuple[str, ...] = ()
    """What else happened in this run's life, in words."""

    @model_validator(mode="after")
    def _sums(self) -> Self:
        numbers = [record.index for record in self.phases]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"phases are numbered {numbers}, not 1 to {len(numbers)}")
        if self.phase != len(self.phases):
            raise ValueError(f"phase is {self.phase}, but {len(self.phases)} phases were begun")
        for record in self.phases[:-1]:
            if not record.finished:
                raise ValueError(f"phase {record.index + 1} was begun before phase {record.index} was finished")
        in_phase = self.phases[-1].consumed_tokens if self.phases else 0
        if self.phase_tokens != in_phase:
            raise ValueError(f"phase_tokens is {self.phase_tokens}, but phase {self.phase} consumed {in_phase}")
        tokens = sum(record.consumed_tokens for record in self.phases)
        if self.tokens_total != tokens:
            raise ValueError(f"tokens_total is {self.tokens_total}, but the phases add up to {tokens}")
        steps = sum(record.steps for record in self.phases)
        if self.steps_total != steps:
            raise ValueError(f"steps_total is {self.steps_total}, but the phases add up to {steps}")
        if self.skipped_steps > self.steps_total:
            raise ValueError(f"skipped_steps is {self.skipped_steps} of only {self.steps_total} steps")
        per_source: dict[str, int] = {}
        for record in self.phases:
            per_source = _added(per_source, record.tokens_per_source)
        if self.tokens_per_source != per_source:
            raise ValueError(f"tokens_per_source is {self.tokens_per_source}, but the phases add up to {per_source}")
        return self

    @classmethod
    def fresh(cls, expected: Expected) -> "Ledger":
        """The ledger of a run that has consumed nothing."""
        return cls(**{name: getattr(expected, name) for name in IDENTITY})

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """Read a ledger file.

        Raises:
            UserError: it is missing, no ledger, of another format version, or its sums do not fit.
        """
        expected, fix = "a ledger of format version 1", "Use another checkpoint."
        raw = read_bounded(path, MAX_LEDGER_BYTES, expected, fix)
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            raise UserError(path, str(first_problem(error)), expected, fix) from None

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Write atomically; raises OSError."""
        write_text_atomic(path, self.to_json())

    @property
    def current(self) -> PhaseRecord | None:
        """The record of the phase being trained; None before the first."""
        return self.phases[-1] if self.phases else None

    def start_phase(
        self,
        plan: PhasePlan,
        micro_batch_size: int,
        world_size: int,
        adapted_blend: Mapping[str, float] | None = None,
    ) -> "Ledger":
        """Begin the next phase; the one before must be finished (ValueError).

        Args:
            adapted_blend: shares to train with instead of the plan's; a note is kept.
        """
        record = PhaseRecord(
            **plan.model_dump(include=set(PhasePlan.model_fields)),
            index=self.phase + 1,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
            adapted_blend=None if adapted_blend is None else dict(adapted_blend),
        )
        begun = replaced(self, phases=(*self.phases, record), phase=self.phase + 1, phase_tokens=0)
        if adapted_blend is None:
            return begun
        shares = ", ".join(f"{name} {share:g}" for name, share in adapted_blend.items())
        return begun.with_note(f"phase {begun.phase} at {self.tokens_total} tokens: blend adapted to {shares}")

    def consume(self, tokens: int, tokens_per_source: Mapping[str, int], skipped_steps: int = 0) -> "Ledger":
        """Account for whole optimizer steps of the current phase.

        Args:
            tokens: tokens of these steps over all ranks.
            tokens_per_source: the same by source.
            skipped_steps: how many of the steps applied no update.

        Raises:
            ValueError: no phase was begun, the sources do not add up, these are no whole steps, or more than planned.
        """
        if self.current is None:
            raise ValueError("tokens were consumed before a phase was begun")
        if tokens < 0 or min(tokens_per_source.values(), default=0) < 0:
            raise ValueError(f"tokens must not be negative: {tokens}, {dict(tokens_per_source)}")
        record = replaced(
            self.current,
            consumed_tokens=self.current.consumed_tokens + tokens,
            tokens_per_source=_added(self.current.tokens_per_source, tokens_per_source),
        )
        return replaced(
            self,
            phases=(*self.phases[:-1], record),
            phase_tokens=record.consumed_tokens,
            tokens_total=self.tokens_total + tokens,
            steps_total=self.steps_total + tokens // record.tokens_per_step,
            skipped_steps=self.skipped_steps + skipped_steps,
            tokens_per_source=_added(self.tokens_per_source, tokens_per_source),
        )

    def with_layout(self, micro_batch_size: int, world_size: int) -> "Ledger":
        """Record that the current phase goes on with another micro-batch or number of processes; a note is kept."""
        if self.current is None:
            raise ValueError("no phase was begun")
        before = (self.current.micro_batch_size, self.current.world_size)
        if before == (micro_batch_size, world_size):
            return self
        record = replaced(self.current, micro_batch_size=micro_batch_size, world_size=world_size)
        note = (
            f"phase {self.phase} at {self.tokens_total} tokens: micro_batch_size {before[0]} -> {micro_batch_size}, "
            f"world_size {before[1]} -> {world_size}"
        )
        return replaced(self, phases=(*self.phases[:-1], record)).with_note(note)

    def with_precision(self, name: str) -> "Ledger":
        """Record the number format that the current phase is trained in from here on; a note is kept where it was another."""
        if self.current is None:
            raise ValueError("no phase was begun")
        before = self.current.precision
        if before == name:
            return self
        changed = replaced(self, phases=(*self.phases[:-1], replaced(self.current, precision=name)))
        if before is None:
            return changed
        return changed.with_note(f"phase {self.phase} at {self.tokens_total} tokens: precision {before} -> {name}")

    def with_reading(self, reading: ReadingRecord) -> "Ledger":
        """Record what the current phase reads from a window on, if that is not what was planned before; a change leaves a note."""
        if self.current is None:
            raise ValueError("no phase was begun")
        before = self.current.readings
        if before and (before[-1].end_window, before[-1].shares) == (reading.end_window, reading.shares):
            return self
        changed = replaced(self.current, readings=(*before, reading))
        ledger = replaced(self, phases=(*self.phases[:-1], changed))
        if not before:
            return ledger
        shares = ", ".join(f"{name} {share:.4g}" for name, share in reading.shares.items())
        return ledger.with_note(
            f"phase {self.phase} at {self.tokens_total} tokens: reads up to window {reading.end_window}, {shares}"
        )

    def with_note(self, note: str) -> "Ledger":
        """The same with one more note."""
        return replaced(self, notes=(*self.notes, note))


def replaced[Model: Stored](model: Model, **changes: object) -> Model:
    """Return a changed copy that is validated as a new one would be (pydantic's `model_copy` is not)."""
    return type(model)(**(dict(model) | changes))


def _added(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {name: left.get(name, 0) + right.get(name, 0) for name in sorted({*left, *right})}
