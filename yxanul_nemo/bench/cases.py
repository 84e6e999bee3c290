"""The cases of a benchmark, from the configuration alone (no torch)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from yxanul_nemo.config.curriculum import PhaseConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import NumberFormat, PrecisionConfig
from yxanul_nemo.curriculum.phases import Phase, batch_layout, check_chunks, plan_phases
from yxanul_nemo.errors import UserError

Shape = tuple[int, int, str, int]
"""Window length, tokens of a step, number format, windows of a micro-batch."""


@dataclass(frozen=True)
class Case:
    """One shape of the training step."""

    phase: Phase
    """What is trained on: its length, tokens per step, learning-rate scale and clip."""
    precision: PrecisionConfig
    micro_batch_size: int
    """Windows of a micro-batch."""
    accumulation: int
    """Micro-batches of a step, on each data-parallel rank."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.phase.seq_len

    @property
    def shape(self) -> Shape:
        """What its speed depends on."""
        return self.phase.seq_len, self.phase.tokens_per_step, self.precision.name, self.micro_batch_size

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.precision.name} seq_len {self.phase.seq_len} micro-batch {self.micro_batch_tokens} x {self.accumulation}"


@dataclass(frozen=True)
class Sweep:
    """All lengths in one precision with micro-batches of up to one size."""

    precision: PrecisionConfig
    micro_batch_tokens: int
    cases: Sequence[Case]


def bench_sweeps(config: RunConfig, formats: Sequence[NumberFormat], data_parallel: int = 1) -> list[Sweep]:
    """Every combination that `bench` asks for; `parallel.micro_batch_tokens` is a number here.

    Args:
        formats: the recipe's, measured where `bench.precision` names none.
        data_parallel: ranks that share a step's windows.

    Raises:
        UserError: a length that the model has no positions for, or that does not fit a micro-batch.
    """
    sweeps = []
    for micro_batch_tokens in config.bench.micro_batch_tokens or [config.parallel.fixed_micro_batch_tokens]:
        for precision in map(config.precision.named, config.bench.precision or formats):
            cases = []
            for phase in _phases(config, micro_batch_tokens, data_parallel):
                check_chunks(phase, config.parallel.context_parallel)
                size, accumulation = batch_layout(phase, data_parallel, micro_batch_tokens, precision.token_multiple)
                cases.append(Case(phase, precision, size, accumulation))
            sweeps.append(Sweep(precision, micro_batch_tokens, cases))
    return sweeps


def bench_cases(config: RunConfig, formats: Sequence[NumberFormat], data_parallel: int = 1) -> list[Case]:
    """The distinct cases of `bench_sweeps`."""
    return distinct_cases(bench_sweeps(config, formats, data_parallel))


def distinct_cases(sweeps: Sequence[Sweep]) -> list[Case]:
    """Their cases, those of one shape once."""
    found: dict[Shape, Case] = {}
    for sweep in sweeps:
        for case in sweep.cases:
            found.setdefault(case.shape, case)
    return list(found.values())


def _phases(config: RunConfig, micro_batch_tokens: int, data_parallel: int) -> list[Phase]:
    if config.bench.seq_len is None:
        return plan_phases(config.curriculum)
    limit = min(config.model.max_position_embeddings, micro_batch_tokens)
    for seq_len in config.bench.seq_len:
        if not 1 <= seq_len <= limit:
            raise UserError(
                "bench.seq_len", f"has {seq_len}", f"1 to {limit} (positions of the model and tokens of a micro-batch)"
            )
    asked_for = config.bench.tokens_per_step
    of_rank = None if asked_for is None else max(1, asked_for // data_parallel)
    lengths = [(n, data_parallel * _whole_step(n, micro_batch_tokens, of_rank)) for n in config.bench.seq_len]
    asked = [PhaseConfig(tokens=tokens, seq_len=n, tokens_per_step=tokens) for n, tokens in lengths]
    return [
        plan_phases(config.curriculum.model_copy(update={"phases": [phase], "total_tokens": None}))[0]
        for phase in asked
    ]


def _whole_step(seq_len: int, micro_batch_tokens: int, tokens_per_step: int | None) -> int:
    """Tokens of a rank's part of a step: nearest to what is asked for, of equal micro-batches that every precision can take."""
    unit = math.lcm(seq_len, PrecisionConfig(name="mxfp8").token_multiple)
    asked = tokens_per_step or 2 * micro_batch_tokens
    micro_batch = max(unit, min(asked, micro_batch_tokens) // unit * unit)
    return max(1, round(asked / micro_batch)) * micro_batch
