"""`stage=generate`: text from a trained model, one as it comes or many at once."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.decoding import Decoder
from yxanul_nemo.export.sampling import Chooser, Sampling, certain_length, first_stop
from yxanul_nemo.export.source import Loaded, load_source
from yxanul_nemo.log import logger
from yxanul_nemo.run_folder import MODEL_SOURCES

INCOMPLETE = "\ufffd"
"""What decoding gives for the first bytes of a character whose rest is still to come."""


class Generated(NamedTuple):
    """What a model wrote."""

    text: str
    """Without the prompt."""
    tokens: int
    """How many it took, without the one that ends a document."""


def generate(
    source: Path,
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    *,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    checkpoint: str = "best",
    device: str = "auto",
    write: Callable[[str], object] | None = None,
) -> Generated:
    """Continue `prompt`, to where the model ends the document, a stop text comes or the most tokens are reached.

    Args:
        source: the folder of a run or of a checkpoint, a `.nemo` file, or a Hugging Face folder.
        prompt: beginning of a document; empty: the model writes one of its own.
        max_new_tokens, temperature, top_p, seed, top_k, repetition_penalty, stop: as in `Sampling`.
        checkpoint: which one of a run: `best` (the newest if none is marked), or `latest`.
        device: `cpu`, `cuda`, or `auto`.
        write: called with each piece of text as soon as it is certain.

    Raises:
        UserError: a wrong setting, or a source that cannot be used.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, tuple(stop), seed)
    sampling.check()
    return generate_batch(load_source(source, checkpoint, device), [prompt], sampling, write)[0]


def generate_with(
    loaded: Loaded,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    *,
    write: Callable[[str], object] | None = None,
) -> Generated:
    """`generate` with a model that is loaded already."""
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return generate_batch(loaded, [prompt], sampling, write)[0]


@torch.inference_mode()
def generate_batch(
    loaded: Loaded, prompts: Sequence[str], sampling: Sampling, write: Callable[[str], object] | None = None
) -> list[Generated]:
    """Continue prompts side by side, each as it would be alone.

    Args:
        write: called with each piece of the first text as soon as it is certain.

    Raises:
        UserError: a wrong setting, or a prompt that fills the model's context.
    """
    sampling.check()
    tokenizer = loaded.tokenizer
    # In training every document stands behind the token that ended the one before.
    prompt_ids = [[tokenizer.eos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    longest = max(map(len, prompt_ids))
    room = loaded.context_tokens - longest
    if room < 1:
        raise UserError(
            "prompt", f"has {longest:,} tokens", f"fewer than the {loaded.context_tokens:,} of the model's context"
        )
    steps = min(sampling.max_new_tokens, room)
    decoder = Decoder(loaded.model, prompt_ids, tokenizer.eos_id, longest + steps)
    chooser = Chooser(sampling, decoder.prompt_BT)
    ignored: Callable[[str], object] = lambda piece: None  # noqa: E731
    texts = [
        TextStream(tokenizer, write if write and not i else ignored, sampling.stop, follows=bool(write and not i))
        for i in range(len(prompts))
    ]
    logits_BV = decoder.read_prompts()
    for step in range(steps):
        ids_B = chooser.choose(logits_BV)
        # The GPU begins the next step while the host looks at this one's tokens.
        if step + 1 < steps:
            logits_BV = decoder.step(ids_B)
        for text, token in zip(texts, ids_B.tolist(), strict=True):
            text.take(token)
        if all(text.is_ended for text in texts):
            break
    for text in texts:
        text.end()
    return [Generated(text.text, text.tokens) for text in texts]


class TextStream:
    """Turns tokens into text as they come. A character split over tokens is held back until it is whole, and so is what may be the
    beginning of a stop text.

    Args:
        write: called with each piece.
        stops: the text ends before the first of these.
        follows: whether `write` is to be called before the end.
    """

    def __init__(
        self, tokenizer: Tokenizer, write: Callable[[str], object], stops: Sequence[str] = (), follows: bool = True
    ):
        self._tokenizer, self._write, self._stops = tokenizer, write, stops
        self._reads = follows or bool(stops)
        self._ids: list[int] = []
        self.is_ended = False
        """Whether the document or the text has come to its end."""
        self.text = ""
        """What was written so far."""

    @property
    def tokens(self) -> int:
        """New tokens so far, without the one that ends a document."""
        return len(self._ids)

    def take(self, token: int) -> None:
        """Take the next token; those after the end are ignored."""
        if self.is_ended:
            return
        if token == self._tokenizer.eos_id:
            self.is_ended = True
            return
        self._ids.append(token)
        if not self._reads:
            return
        text = self._tokenizer.decode(self._ids)
        if (place := first_stop(text, self._stops)) is not None:
            self.is_ended = True
            self._emit(text[:place])
        elif not text.endswith(INCOMPLETE):
            self._emit(text[: certain_length(text, self._stops)])

    def end(self) -> None:
        """Write what was held back."""
        text = self._tokenizer.decode(self._ids)
        self._emit(text[: first_stop(text, self._stops)])

    def _emit(self, text: str) -> None:
        if len(text) > len(self.text):
            self._write(text[len(self.text) :])
            self.text = text


def run_generate_stage(config: RunConfig) -> None:
    """Continue `prompt`, or each line of `generate.prompts`, with the model of `from` (by default the run's own) on standard output.

    The text of one prompt comes piece by piece; texts of a file come as JSON lines, in its order.
    """
    settings, sources = config.generate, config.sources or [config.run.dir]
    if len(sources) > 1:
        raise UserError("from", f"names {len(sources)} models", "one of them", MODEL_SOURCES)
    sampling = Sampling(
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        settings.top_k,
        settings.repetition_penalty,
        tuple(settings.stop),
        settings.seed,
    )
    sampling.check()
    if settings.prompts is not None and config.prompt:
        raise UserError("prompt", "is given with generate.prompts", "one of the two")
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    began = time.perf_counter()
    loaded = load_source(sources[0], settings.checkpoint, config.parallel.device)
    logger.info("%s loaded in %.1f s", loaded.described, time.perf_counter() - began)
    began = time.perf_counter()
    if prompts is None:
        print(config.prompt, end="", flush=True)
        written = generate_batch(loaded, [config.prompt], sampling, lambda piece: print(piece, end="", flush=True))
        print()
    else:
        written = []
        for i in range(0, len(prompts), settings.batch):
            part = prompts[i : i + settings.batch]
            made = generate_batch(loaded, part, replace(sampling, seed=sampling.seed + i))
            for prompt, text in zip(part, made, strict=True):
                line = {"prompt": prompt, "text": text.text, "tokens": text.tokens}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            written += made
    seconds, tokens = time.perf_counter() - began, sum(text.tokens for text in written)
    logger.info("%s: %d tokens in %.2f s, %.0f per second", loaded.described, tokens, seconds, tokens / seconds)


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file; UserError if it cannot be read or has none."""
    try:
        prompts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "generate.prompts", f"{path} cannot be read ({error})", "a text file with one prompt in each line"
        ) from None
    if not prompts:
        raise UserError("generate.prompts", f"{path} is empty", "one prompt in each line")
    return prompts
