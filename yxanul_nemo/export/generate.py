"""`stage=generate`: text from a trained model, with transformers' KV cache and sampling."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.llama import generate_ids
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
    checkpoint: str = "best",
    device: str = "auto",
    write: Callable[[str], object] | None = None,
) -> Generated:
    """Continue `prompt`, to where the model ends the document or the most tokens are reached.

    Args:
        source: the folder of a run or of a checkpoint, a `.nemo` file, or a Hugging Face folder.
        prompt: beginning of a document; empty: the model writes one of its own.
        max_new_tokens: most tokens to add; fewer if the model's context ends.
        temperature: 0 takes the most likely token each time; 1 samples from the model's own probabilities.
        top_p: sample only among the most likely tokens that together have this probability (arXiv:1904.09751).
        seed: the same seed gives the same text on the same machine.
        checkpoint: which one of a run: `best` (the newest if none is marked), or `latest`.
        device: `cpu`, `cuda`, or `auto`.
        write: called with each piece of text as soon as it is certain.

    Raises:
        UserError: a wrong setting, or a source that cannot be used.
    """
    _check_settings(max_new_tokens, temperature, top_p)
    return generate_with(
        load_source(source, checkpoint, device), prompt, max_new_tokens, temperature, top_p, seed, write=write
    )


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
    _check_settings(max_new_tokens, temperature, top_p)
    tokenizer = loaded.tokenizer
    # In training every document stands behind the token that ended the one before.
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt).tolist()]
    room = loaded.context_tokens - len(ids)
    if room < 1:
        raise UserError(
            "prompt", f"has {len(ids):,} tokens", f"fewer than the {loaded.context_tokens:,} of the model's context"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=min(max_new_tokens, room),
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        **sampling,
    )
    text = TextStream(tokenizer, write or (lambda piece: None))
    device = loaded.model.device
    ids_BT = torch.tensor([ids], device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        generate_ids(loaded.model, ids_BT, settings, text)
    return Generated(text.text, text.tokens)


class TextStream(BaseStreamer):
    """Turns tokens into text as they come; a character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]):
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._is_prompt = True
        self.text = ""
        """What was written so far."""

    @property
    def tokens(self) -> int:
        """New tokens so far, without the one that ends a document."""
        return len(self._ids)

    def put(self, value: Tensor) -> None:
        """Take the prompt (the first call) or new tokens."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += [token for token in value.flatten().tolist() if token != self._tokenizer.eos_id]
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(INCOMPLETE):
            self._emit(text)

    def end(self) -> None:
        """Write what was held back."""
        self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> None:
        if len(text) > len(self.text):
            self._write(text[len(self.text) :])
            self.text = text


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UserError("max_new_tokens", f"is {max_new_tokens}", "at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError("temperature", f"is {temperature}", "0 (the most likely token each time) or more")
    if not 0 < top_p <= 1:
        raise UserError("top_p", f"is {top_p}", "above 0 and at most 1")


def run_generate_stage(config: RunConfig) -> None:
    """Continue `prompt` with the model of `from` (by default the run's own) on standard output, piece by piece."""
    settings, sources = config.generate, config.sources or [config.run.dir]
    if len(sources) > 1:
        raise UserError("from", f"names {len(sources)} models", "one of them", MODEL_SOURCES)
    loaded = load_source(sources[0], settings.checkpoint, config.parallel.device)
    print(config.prompt, end="", flush=True)
    began = time.perf_counter()
    written = generate_with(
        loaded,
        config.prompt,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        settings.seed,
        write=lambda piece: print(piece, end="", flush=True),
    )
    print()
    seconds = time.perf_counter() - began
    logger.info(
        "%s: %d tokens in %.2f s, %.0f per second", loaded.described, written.tokens, seconds, written.tokens / seconds
    )
