"""From the curriculum's configuration to phases in whole steps, and from a phase to the batch of one machine. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.corpus.manifest import CorpusManifest
from yxanul_nemo.config.curriculum import CurriculumConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import SHORTEST_CONTEXT_CHUNK
from yxanul_nemo.curriculum.adapt import largest_shares
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.errors import UserError


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one sequence length. Everything is in tokens or derived from tokens."""

    number: int
    """Place in the curriculum, from 1."""
    seq_len: int
    """Window length."""
    steps: int
    """Optimizer steps."""
    tokens_per_step: int
    """Tokens of one step over all ranks."""
    first_token: int
    """Tokens that the phases before it train on."""
    lr_scale: float
    """Factor on the learning-rate schedule."""
    grad_clip: float
    """Largest gradient norm."""
    blend: Mapping[str, float] | None
    """Share of each source; None: in proportion to the sources' sizes."""
    description: str
    """What the phase is for."""

    @property
    def tokens(self) -> int:
        """Tokens that the phase trains on, a whole number of steps."""
        return self.steps * self.tokens_per_step

    @property
    def windows_per_step(self) -> int:
        """Windows of one step over all ranks."""
        return self.tokens_per_step // self.seq_len


def plan_phases(curriculum: CurriculumConfig) -> list[Phase]:
    """The phases with their tokens scaled to `total_tokens` (shares kept) and rounded to whole steps, at least one each."""
    configured = sum(phase.tokens for phase in curriculum.phases)
    scale = (curriculum.total_tokens or configured) / configured
    phases: list[Phase] = []
    first_token = 0
    for number, config in enumerate(curriculum.phases, start=1):
        phase = Phase(
            number=number,
            seq_len=config.seq_len,
            steps=max(1, round(config.tokens * scale / config.tokens_per_step)),
            tokens_per_step=config.tokens_per_step,
            first_token=first_token,
            lr_scale=config.lr_scale,
            grad_clip=config.grad_clip,
            blend=config.blend or curriculum.blend,
            description=config.description,
        )
        phases.append(phase)
        first_token += phase.tokens
    return phases


def total_tokens(phases: Sequence[Phase]) -> int:
    """Tokens of the whole curriculum."""
    return sum(phase.tokens for phase in phases)


def source_sizes(config: RunConfig, manifest: CorpusManifest) -> dict[str, int]:
    """Training tokens of each configured source of a prepared corpus; refuses a corpus that lacks one of them."""
    for name in config.data.source_names:
        if name not in manifest.sources:
            raise UserError(
                f"data.sources.{name}",
                f"is not in the prepared corpus {config.data_dir}",
                f"one of {', '.join(manifest.sources)}",
                "Run `python launcher.py stage=data` with the same settings, or choose another data.dir.",
            )
    return {name: manifest.sources[name].tokens("train") for name in config.data.source_names}


def tokens_per_source(
    phases: list[Phase], sizes: Mapping[str, int], adapt_bounds: Sequence[float] | None = None
) -> dict[str, float]:
    """Tokens that the curriculum takes from each source of the given sizes.

    Args:
        adapt_bounds: of `curriculum.adapt_blend`, where it is on; the most that each source could then have to give.
    """
    names = list(sizes)
    taken = np.zeros(len(names))
    for phase in phases:
        shares = normalized_shares(names, phase.blend, sizes)
        if adapt_bounds is not None and phase.number > 1:
            shares = largest_shares(shares, adapt_bounds)
        taken += shares * phase.tokens
    return dict(zip(names, taken.tolist(), strict=True))


def check_enough_tokens(config: RunConfig, phases: list[Phase], sizes: Mapping[str, int]) -> dict[str, float]:
    """Epochs that the curriculum needs of each source; refuses more than `data.max_epochs` and sources without tokens."""
    epochs = {}
    bounds = config.curriculum.adapt_blend_bounds if config.curriculum.adapt_blend else None
    for name, tokens in tokens_per_source(phases, sizes, bounds).items():
        if tokens and not sizes[name]:
            raise UserError(
                f"data source {name}", "has no training tokens", "some text", "Check its path and stage=data's counts."
            )
        longest = max(phase.seq_len for phase in phases)
        if tokens and sizes[name] < longest:
            raise UserError(
                f"data source {name}",
                f"has {sizes[name]:,} training tokens, fewer than a window of the curriculum",
                f"at least {longest:,} tokens",
                "Add text to it, or shorten the windows (curriculum.phases[].seq_len).",
            )
        epochs[name] = tokens / sizes[name] if tokens else 0.0
        if epochs[name] > config.data.max_epochs:
            raise UserError(
                "data.max_epochs",
                f"is {config.data.max_epochs:g}, but the curriculum reads source '{name}' ({sizes[name]:,} tokens) "
                f"{'up to ' if bounds else ''}{epochs[name]:.2f} times",
                fix=f"Add data, lower curriculum.total_tokens, or set data.max_epochs={epochs[name] + 0.01:.2f}.",
            )
    return epochs


def batch_layout(phase: Phase, data_parallel: int, micro_batch_tokens: int, token_multiple: int = 1) -> tuple[int, int]:
    """(micro_batch_size, accumulation) per rank: the largest even split of a step into micro-batches of at most `micro_batch_tokens`.

    Args:
        token_multiple: what the tokens of a micro-batch must be a multiple of (`PrecisionConfig.token_multiple`).
    """
    windows = phase.windows_per_step
    if windows % data_parallel:
        raise UserError(
            f"curriculum phase {phase.number}: tokens_per_step",
            f"{phase.tokens_per_step} is {windows} windows of {phase.seq_len} tokens, which {data_parallel} ranks cannot share evenly",
            f"a multiple of {phase.seq_len * data_parallel}",
        )
    per_rank = windows // data_parallel
    most = max(1, micro_batch_tokens // phase.seq_len)
    accumulations = [a for a in range(1, per_rank + 1) if per_rank % a == 0 and per_rank // a <= most]
    for accumulation in accumulations:
        size = per_rank // accumulation
        if size * phase.seq_len % token_multiple == 0:
            return size, accumulation
    raise UserError(
        f"curriculum phase {phase.number}: tokens_per_step",
        f"{phase.tokens_per_step} cannot be split over {data_parallel} ranks into micro-batches of at most {micro_batch_tokens} tokens "
        f"that are a multiple of {token_multiple} tokens, which this precision needs",
        f"a multiple of {math.lcm(phase.seq_len, token_multiple) * data_parallel}, and parallel.micro_batch_tokens of at least "
        f"{math.lcm(phase.seq_len, token_multiple)}",
    )


def check_chunks(phase: Phase, context_parallel: int) -> None:
    """Refuse windows that cannot be cut into two chunks for each context-parallel rank."""
    chunks = 2 * context_parallel
    if context_parallel > 1 and (phase.seq_len % chunks or phase.seq_len // chunks < SHORTEST_CONTEXT_CHUNK):
        raise UserError(
            f"curriculum phase {phase.number}: seq_len",
            f"is {phase.seq_len}, which parallel.context_parallel={context_parallel} ranks cannot share",
            f"a multiple of {chunks}, and at least {chunks * SHORTEST_CONTEXT_CHUNK}",
            "Train phases of short windows with parallel.context_parallel=1, as in phases=1-5; checkpoints fit either.",
        )


def selected_phases(selection: str | int | None, count: int) -> range:
    """Phase numbers meant by `phases=3`, `phases=3-5` or nothing (all), from 1."""
    if selection is None:
        return range(1, count + 1)
    first, _, last = str(selection).partition("-")
    try:
        chosen = range(int(first), int(last or first) + 1)
    except ValueError:
        chosen = range(0)
    if not chosen or chosen[0] < 1 or chosen[-1] > count:
        raise UserError("phases", f"is {selection!r}", f"a number or a range within 1-{count}, as in phases=2-3")
    return chosen
