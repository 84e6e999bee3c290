"""Sizes of a run from its text, the machine and the hours: for each model of a ladder the tokens that it can see, and of them the model
whose loss is expected to be lowest. No torch.

The expected loss is that of Hoffmann et al. 2022 ("Training compute-optimal large language models", method 3) with the constants of
Besiroglu et al. 2024 ("Chinchilla scaling: a replication attempt"), repeated text counted as by Muennighoff et al. 2023 ("Scaling
data-constrained language models"). Their models have 44 million parameters and more: below that the order of models is what it is used for.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import yaml

from yxanul_nemo.config.conf_files import CONF_DIR
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.figures import count, duration, size
from yxanul_nemo.machine.gpu_table import Gpu
from yxanul_nemo.machine.gpus import found_gpus
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.model.memory import COMFORTABLE_SHARE, CPU_MICRO_BATCH_TOKENS, largest_micro_batch_tokens
from yxanul_nemo.plan.estimates import forecast_speed
from yxanul_nemo.plan.gpu import choose_gpu, planned_precision
from yxanul_nemo.plan.preflight import TOKENIZED_BYTES_PER_SECOND_PER_CORE
from yxanul_nemo.plan.source_sizes import bytes_per_token_of, source_size

LADDER = (
    "demo",
    "yxanul_3m",
    "yxanul_11m",
    "yxanul_30m",
    "yxanul_60m",
    "yxanul_270m_slim",
    "yxanul_197m",
    "yxanul_270m",
)
"""Files of `conf/model`, from 1.1 to 294 million parameters."""
VOCABULARY = {
    "demo": 4096,
    "yxanul_3m": 8192,
    "yxanul_11m": 16384,
    "yxanul_30m": 32768,
    "yxanul_60m": 32768,
}
"""Largest vocabulary for a model, so that its embedding stays the smaller part."""
RELEASED, RELEASED_IDS = "superbpe_t180k", 200_005
"""Tokenizer of models that are not in `VOCABULARY`; of the two released ones the better one for short runs (BENCHMARKS.md)."""
LEAST_TEXT_FOR_RELEASED_BYTES = 1e9
"""Text below which a tokenizer of its own is trained: in less, most of 200,000 ids are seen too seldom to be learned."""
BYTES_PER_ID = 500
"""Text for each id of a vocabulary that is trained on it; the demo has 1,000."""
SMALLEST_VOCABULARY = 512
WITHIN_WORDS = 0.75
"""Share of a SuperBPE vocabulary that is merged inside words, as in the demo."""
TRAIN_BYTES = 20_000_000
"""Text that a tokenizer is trained on at most, some minutes of two cores."""
MOST_EPOCHS = 4
"""How often text is read at most."""
TRAINING_SHARE = 0.85
"""Of the time; the rest is for starts, saves, validation and export."""
TOKENS_PER_STEP = {737_280: 1024, 50_000_000: 32_768, 1_000_000_000: 65_536}
"""Tokens of a run -> of a step, in the runs that learning rates were tuned in (BENCHMARKS.md); between them by logarithms."""
TUNED_LR = {128: 1e-2, 768: 2.4e-3}
"""Width of the model -> Muon's learning rate that was best: the demo's and the 197M model's (BENCHMARKS.md); between and beyond them by
logarithms, so that it falls with nearly the width."""
CPU_PHASES = ((16, 0.22, 0.7, 0.5), (64, 0.33, 1.0, 1.0), (256, 0.45, 1.0, 1.0))
"""Length of windows, share of the tokens, factors on learning rate and clipping: those of the demo, 4% ahead of 256 tokens throughout."""
GPU_PHASES = tuple(
    (seq_len, share, 1.0, 1.0) for seq_len, share in ((128, 0.2), (256, 0.15), (512, 0.15), (1024, 0.17), (2048, 0.33))
)
"""Those of `curriculum=from_128`, of the curricula the one that measured best."""
SAVE_SECONDS = 600
"""Between checkpoints inside a phase."""
FEWEST_DOCUMENTS = 8
"""Less cannot be split into text to train on and text to measure with."""
LEAST_TOKENS_PER_PARAMETER = 1
"""A larger model is not taken: the formula is about tokens in plenty, and the demo, with 0.65, is the only run here that had fewer."""
SHORTEST_RUN_STEPS = 30
"""Below it there is nothing to train."""
TOKENIZER_SECONDS_PER_BYTE = 1.5e-5
"""For training a SuperBPE tokenizer: the demo's took about a minute for 4 MB."""
COMPARED_BYTES_PER_TOKEN = 4.5
"""Bytes of a token in the papers."""
LOSS_E, LOSS_A, LOSS_B, LOSS_ALPHA, LOSS_BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
REPEATED_HALF_LIFE = 15.39
"""R* of Muennighoff et al.: what repeated text is worth falls off with it."""


@dataclass(frozen=True)
class Text:
    """What there is to train on."""

    text_bytes: float
    """Infinite where it is fetched as needed."""
    documents: float


@dataclass(frozen=True)
class Candidate:
    """One model of the ladder, and the run that it could have."""

    option: str
    model: ModelConfig
    vocab_size: int
    parameters: int
    tokens_per_second: float
    affordable_tokens: float
    """In the time."""
    tokens: float
    """Of them, what the text has, read `MOST_EPOCHS` times."""
    epochs: float
    loss: float
    """Expected, in nats per token of the papers; only differences mean something."""


class Sizes(NamedTuple):
    """The keys that were chosen, as on a command line, and why, a sentence each."""

    overrides: list[str]
    because: list[str]


def size_run(config: RunConfig, given: Sequence[str]) -> Sizes:
    """Choose the sizes of a run.

    Args:
        config: with `budget.hours`.
        given: keys and groups that the command line names; they are left as they are.

    Raises:
        UserError: the text cannot be looked at, or the time is too short.
    """
    assert config.budget.hours is not None
    gpu, _ = choose_gpu(config, found_gpus())
    cores = len(os.sched_getaffinity(0))
    text = _text(config)
    if text.documents < FEWEST_DOCUMENTS:
        documents = f"hold about {text.documents:.0f} documents, {size(text.text_bytes)} of text"
        fix = "Give more text; text files over 16 KiB are cut into several documents."
        raise UserError("data.sources", documents, f"at least {FEWEST_DOCUMENTS}", fix)
    seconds = _seconds_of_training(config, text, cores)
    fixed_model = any(_names(key, "model") for key in given)
    fixed_tokenizer = any(_names(key, "tokenizer") for key in given)
    options = [""] if fixed_model else LADDER
    found = [_candidate(config, option, fixed_tokenizer, gpu, cores, text, seconds) for option in options]
    candidates = [one for one in found if one is not None]
    if not candidates:
        raise UserError(
            "model", "is too large for this machine's memory", "a smaller one", "Leave it out to have it chosen."
        )
    fed = [one for one in candidates if one.tokens >= LEAST_TOKENS_PER_PARAMETER * one.parameters]
    best = min(fed or candidates[:1], key=lambda one: one.loss)
    overrides, tokens_per_step = _overrides(config, best, gpu, text, fixed_tokenizer)
    if best.tokens < SHORTEST_RUN_STEPS * tokens_per_step:
        raise UserError(
            "budget.hours",
            f"is {config.budget.hours:g}, and in it this text and machine come to {best.tokens:,.0f} tokens of training",
            f"at least {SHORTEST_RUN_STEPS * tokens_per_step:,}",
            "Give more text or more time.",
        )

    def is_given(override: str) -> bool:
        name = override.partition("=")[0]
        return any(_names(key, name) or _names(name, key) for key in given)

    chosen = [one for one in overrides if not is_given(one)]
    return Sizes(chosen, _because(config, candidates, best, gpu, cores, text, seconds))


def _names(key: str, section: str) -> bool:
    """Return whether a key is a section or in it."""
    return key == section or key.startswith(f"{section}.")


def _text(config: RunConfig) -> Text:
    if config.data.demo_corpus:
        return Text(config.data.demo_bytes, config.data.demo_bytes / 1000)
    found = [
        source_size(name, source) if source.path is not None else None for name, source in config.data.sources.items()
    ]
    own = [one for one in found if one is not None]
    if len(own) < len(found):
        return Text(math.inf, math.inf)
    return Text(sum(one.text_bytes for one in own), sum(one.documents for one in own))


def _seconds_of_training(config: RunConfig, text: Text, cores: int) -> float:
    """Return the time that is left for steps."""
    assert config.budget.hours is not None
    whole = config.budget.hours * 3600
    tokenizing = text.text_bytes / TOKENIZED_BYTES_PER_SECOND_PER_CORE / cores if text.text_bytes < math.inf else 0.0
    tokenizer = min(text.text_bytes, TRAIN_BYTES) * TOKENIZER_SECONDS_PER_BYTE
    left = TRAINING_SHARE * whole - tokenizing - tokenizer
    if left < whole / 4:
        raise UserError(
            "budget.hours",
            f"is {config.budget.hours:g}, and tokenizing {size(text.text_bytes)} of text takes {duration(tokenizing + tokenizer)} of it",
            "more time, or less text",
            "A glob names a part of the files: data.sources.text.path='FOLDER/a*.txt'.",
        )
    return left


def vocabulary_for(option: str, text_bytes: float) -> int | None:
    """Return the ids of a tokenizer that is trained for a model on so much text; None: the released one."""
    if option not in VOCABULARY and text_bytes >= LEAST_TEXT_FOR_RELEASED_BYTES:
        return None
    by_text = 2 ** int(math.log2(max(SMALLEST_VOCABULARY, min(text_bytes, 1e12) / BYTES_PER_ID)))
    return min(VOCABULARY.get(option, max(VOCABULARY.values())), by_text)


def _candidate(
    config: RunConfig, option: str, fixed_tokenizer: bool, gpu: Gpu | None, cores: int, text: Text, seconds: float
) -> Candidate | None:
    """Return the run that a model of the ladder ("": the configured one) could have; None where memory has no room for it."""
    model = config.model if not option else read_model(option)
    vocab_size = vocabulary_for(option, text.text_bytes) or RELEASED_IDS
    if fixed_tokenizer:
        vocab_size = config.tokenizer.vocab_size or RELEASED_IDS
    phases = CPU_PHASES if gpu is None else GPU_PHASES
    precision = planned_precision(config, gpu)
    rows = model.padded_vocab_size(vocab_size)
    micro_batch_tokens = CPU_MICRO_BATCH_TOKENS
    if gpu is not None:
        fits = largest_micro_batch_tokens(
            model, rows, precision, config.parallel, COMFORTABLE_SHARE * gpu.memory_bytes, config.optim.muon is not None
        )
        if fits < phases[-1][0]:
            return None
        micro_batch_tokens = min(32_768, fits)
    seconds_per_token = sum(
        share
        / forecast_speed(
            model,
            vocab_size,
            precision,
            config.parallel,
            gpu,
            seq_len,
            micro_batch_tokens,
            1,
            cores,
            1.0 if config.optim.muon else 0.0,
        ).tokens_per_second
        for seq_len, share, _, _ in phases
    )
    affordable = seconds / seconds_per_token
    per_token = bytes_per_token_of(vocab_size)
    unique = text.text_bytes / per_token
    tokens = min(affordable, MOST_EPOCHS * unique)
    parameters = parameter_count(model, rows)
    return Candidate(
        option=option or model.name,
        model=model,
        vocab_size=vocab_size,
        parameters=parameters,
        tokens_per_second=1 / seconds_per_token,
        affordable_tokens=affordable,
        tokens=tokens,
        epochs=tokens / unique,
        loss=expected_loss(parameters, tokens * per_token, unique * per_token),
    )


def expected_loss(parameters: float, read_bytes: float, unique_bytes: float) -> float:
    """Return the expected loss of a model that has read so much text, of which so much was different."""
    unique = min(read_bytes, unique_bytes) / COMPARED_BYTES_PER_TOKEN
    repeats = max(0.0, read_bytes / COMPARED_BYTES_PER_TOKEN / unique - 1)
    worth = unique * (1 + REPEATED_HALF_LIFE * (1 - math.exp(-repeats / REPEATED_HALF_LIFE)))
    return LOSS_E + LOSS_A / parameters**LOSS_ALPHA + LOSS_B / worth**LOSS_BETA


def read_model(option: str) -> ModelConfig:
    """Return a model of `conf/model`."""
    return ModelConfig.model_validate(
        yaml.safe_load((CONF_DIR / "model" / f"{option}.yaml").read_text(encoding="utf-8"))
    )


def tokens_per_step_for(tokens: float, longest_seq_len: int) -> int:
    """Return the tokens of a step for a run of so many, whole windows of each length."""
    wanted = 2 ** np.interp(
        math.log2(max(1.0, tokens)), np.log2(list(TOKENS_PER_STEP)), np.log2(list(TOKENS_PER_STEP.values()))
    )
    return max(1, round(float(wanted) / longest_seq_len)) * longest_seq_len


def held_out_share(documents: float) -> float:
    """Return the share to hold out: about 20 documents, at most a twentieth, but so much that a small text has some at all.

    Documents are chosen by a hash, so that with six expected one text in 400 has none.
    """
    return max(0.001, min(0.05, 20 / documents), min(0.3, 6 / documents))


def learning_rate_for(hidden_size: int) -> float:
    """Return Muon's learning rate for a model of this width, to two digits."""
    (small, large), (high, low) = TUNED_LR, TUNED_LR.values()
    slope = math.log(low / high) / math.log(large / small)
    return float(f"{high * (hidden_size / small) ** slope:.1e}")


def _overrides(
    config: RunConfig, best: Candidate, gpu: Gpu | None, text: Text, fixed_tokenizer: bool
) -> tuple[list[str], int]:
    phases = CPU_PHASES if gpu is None else GPU_PHASES
    longest = phases[-1][0]
    tokens_per_step = tokens_per_step_for(best.tokens, longest)
    listed = [
        f"{{seq_len:{seq_len},tokens:{max(tokens_per_step, round(share * best.tokens / tokens_per_step) * tokens_per_step)},"
        f"tokens_per_step:{tokens_per_step},lr_scale:{lr_scale},grad_clip:{grad_clip}}}"
        for seq_len, share, lr_scale, grad_clip in phases
    ]
    overrides = [f"model={best.option}"] if best.option in LADDER else []
    own_vocabulary = vocabulary_for(best.option, text.text_bytes)
    if own_vocabulary is None:
        overrides.append(f"tokenizer={RELEASED}")
    elif not fixed_tokenizer:
        overrides += [
            f"tokenizer.vocab_size={own_vocabulary}",
            f"tokenizer.transition={max(400, int(WITHIN_WORDS * own_vocabulary))}",
            f"tokenizer.train_bytes={TRAIN_BYTES}",
        ]
    overrides += ["curriculum.name=mine", f"curriculum.phases=[{','.join(listed)}]", f"validation.eval_len={longest}"]
    if config.optim.muon is not None:
        overrides.append(f"optim.lr={learning_rate_for(best.model.hidden_size)}")
    every = max(10 * tokens_per_step, round(SAVE_SECONDS * best.tokens_per_second))
    share = held_out_share(text.documents)
    overrides += [f"checkpoint.every_tokens={every}", f"data.heldout_fraction={share:.3g}"]
    return overrides, tokens_per_step


def _because(
    config: RunConfig,
    candidates: Sequence[Candidate],
    best: Candidate,
    gpu: Gpu | None,
    cores: int,
    text: Text,
    seconds: float,
) -> list[str]:
    machine = gpu.name if gpu else f"{cores} cores of a CPU"
    amount = f"{size(text.text_bytes)} of text" if text.text_bytes < math.inf else "as much text as is needed"
    lines = [
        f"{config.budget.hours:g} h on {machine}, of which {duration(seconds)} are left for training; {amount}, read "
        f"{MOST_EPOCHS} times at most"
    ]
    for one in candidates:
        mark = "chosen" if one is best else "      "
        limit = "the time" if one.tokens == one.affordable_tokens else "the text"
        lines.append(
            f"{mark} {one.option:>16}: {count(one.parameters, 3):>6} parameters, {count(one.vocab_size, 3):>5} ids, "
            f"~{count(one.tokens_per_second, 3)} tokens/s, {count(one.tokens, 3)} tokens by {limit}, expected loss {one.loss:.3g}"
        )
    lines.append(
        "expected loss: Hoffmann et al. 2022 for parameters and tokens, repeated text as in Muennighoff et al. 2023; only its order counts"
    )
    lines.append(
        f"learning rate and tokens of a step: between the runs that were tuned (demo, 197M model), for width {best.model.hidden_size}"
    )
    return lines
