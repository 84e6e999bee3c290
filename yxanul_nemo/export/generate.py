"""Text from a trained model: a run's checkpoint, a `.nemo` file or a Hugging Face folder.

`python -m yxanul_nemo.export.generate --from runs/demo --prompt "The"`. Whatever the source, the model runs as transformers'
Llama (the factorized embedding multiplied out), whose KV cache and sampling are used. It computes in FP32 on a CPU and in BF16
on a GPU, also where it was trained in FP8.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from data_prep.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.fold import llama_config, to_llama
from yxanul_nemo.export.hf_folder import CONFIG_NAME, WEIGHTS_NAME, open_hf_folder
from yxanul_nemo.export.llama import build_llama, generation_settings
from yxanul_nemo.launch.worker import quiet_libraries
from yxanul_nemo.model.nemo_archive import open_archive

INCOMPLETE = "\ufffd"
"""What decoding gives for the first bytes of a character whose rest is still to come."""
SOURCES = "the folder of a run or of a checkpoint, a .nemo file, or a Hugging Face folder"


class Generated(NamedTuple):
    """What a model wrote."""

    text: str
    """Without the prompt."""
    tokens: int
    """How many it took, without the one that ends a document."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    context_tokens: int
    """Longest text that it may see."""
    described: str
    """What it was loaded from."""


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
    _check_settings(max_new_tokens, temperature, top_p, checkpoint)
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
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.inference_mode(),
        generation_settings(loaded.model, settings),
    ):
        torch.manual_seed(seed)
        loaded.model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), streamer=text)
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


def load_source(source: Path, checkpoint: str = "best", device: str = "auto") -> Loaded:
    """The model in a run, a checkpoint, a `.nemo` file or a Hugging Face folder.

    Raises:
        UserError: it is none of these, or damaged.
    """
    source, target = Path(source), _resolve_device(device)
    if source.is_file():
        loaded = _from_nemo(source)
    elif (source / CONFIG_NAME).is_file():
        loaded = _from_hf(source)
    elif (source / "checkpoints").is_dir():
        loaded = _from_checkpoint(_chosen(source / "checkpoints", checkpoint))
    elif source.parent.name == "checkpoints" and source.is_dir():
        loaded = _from_checkpoint(_named(source))
    else:
        raise UserError(source, "does not exist" if not source.exists() else "holds no model", SOURCES)
    loaded.model.to(target, torch.bfloat16 if target.type == "cuda" else torch.float32)
    return loaded


def _from_nemo(path: Path) -> Loaded:
    with open_archive(path) as archive:
        tokenizer, shape = archive.tokenizer(), archive.config.gpt
        weights = to_llama(archive.weights(), shape, archive.config.vocab_size)
    config = llama_config(shape, archive.config.vocab_size, tokenizer.eos_id, None, "float32")
    return Loaded(build_llama(weights, config, path), tokenizer, shape.max_position_embeddings, str(path))


def _from_hf(path: Path) -> Loaded:
    folder = open_hf_folder(path)
    model = build_llama(folder.weights(), folder.config, path / WEIGHTS_NAME)
    return Loaded(model, folder.tokenizer(), model.config.max_position_embeddings, str(path))


def _from_checkpoint(checkpoint: Checkpoint) -> Loaded:
    from yxanul_nemo.model.build import reference_precision
    from yxanul_nemo.training.restore import restore_model

    # What it was trained with, whatever the run is configured for now.
    config = load_run_config(checkpoint.path / "config.yaml")
    tokenizer_folder = checkpoint.path.parent.parent / "tokenizer"
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.fingerprint != checkpoint.read_ledger().tokenizer_fingerprint:
        raise UserError(tokenizer_folder, f"is not the tokenizer of {checkpoint.path}")
    model = restore_model(config, checkpoint, tokenizer.vocab_size, *reference_precision())
    shape = model.model_shape
    weights = to_llama(model.state_dict(), shape, tokenizer.vocab_size)
    llama = build_llama(weights, llama_config(shape, tokenizer.vocab_size, tokenizer.eos_id, None, "float32"))
    return Loaded(llama, tokenizer, shape.max_position_embeddings, str(checkpoint.path))


def _chosen(root: Path, which: str) -> Checkpoint:
    store = CheckpointStore(root)
    checkpoint = (store.best() if which == "best" else None) or store.newest_good()
    if checkpoint is None:
        raise UserError(root, "holds no checkpoint", fix="Run `python launcher.py stage=train` first.")
    return checkpoint


def _named(path: Path) -> Checkpoint:
    store = CheckpointStore(path.parent)
    found = next((checkpoint for checkpoint in store.list() if checkpoint.path.name == path.name), None)
    if found is None:
        raise UserError(path, "is no complete checkpoint", "a folder that training committed")
    store.check(found)
    return found


def _resolve_device(device: str) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError("device", f"is {device!r}", "auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("device", "is cuda, but torch finds no GPU", "an NVIDIA GPU and its driver", "Use cpu.")
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, checkpoint: str = "best") -> None:
    if max_new_tokens < 1:
        raise UserError("max_new_tokens", f"is {max_new_tokens}", "at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError("temperature", f"is {temperature}", "0 (the most likely token each time) or more")
    if not 0 < top_p <= 1:
        raise UserError("top_p", f"is {top_p}", "above 0 and at most 1")
    if checkpoint not in ("best", "latest"):
        raise UserError("checkpoint", f"is {checkpoint!r}", "best or latest")


def main() -> int:
    """Exit code: 0, or 2 for the user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m yxanul_nemo.export.generate", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help=SOURCES)
    parser.add_argument("--prompt", default="", help="beginning of the text")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token each time")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", choices=["best", "latest"], default="best", help="which one of a run")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()
    quiet_libraries()
    try:
        _check_settings(options.max_new_tokens, options.temperature, options.top_p)
        loaded = load_source(options.source, options.checkpoint, options.device)
        print(options.prompt, end="", flush=True)
        began = time.perf_counter()
        written = generate_with(
            loaded,
            options.prompt,
            options.max_new_tokens,
            options.temperature,
            options.top_p,
            options.seed,
            write=lambda piece: print(piece, end="", flush=True),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    seconds = time.perf_counter() - began
    speed = f"{written.tokens} tokens in {seconds:.2f} s, {written.tokens / seconds:.0f} per second"
    print(f"{loaded.described}: {speed}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
