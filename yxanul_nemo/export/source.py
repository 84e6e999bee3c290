"""A trained model from wherever it is kept: a run, a checkpoint, a `.nemo` file or a Hugging Face folder.

Whatever the source, the model runs as transformers' Llama (the factorized embedding multiplied out): in FP32 on a CPU and in
BF16 on a GPU, also where it was trained in FP8.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.fold import llama_config, to_llama
from yxanul_nemo.export.hf_folder import CONFIG_NAME, open_hf_folder
from yxanul_nemo.export.llama import build_llama, moved
from yxanul_nemo.model.nemo_archive import open_archive
from yxanul_nemo.run_folder import MODEL_SOURCES, RunFolder


@dataclass(frozen=True)
class Loaded:
    """A model ready to be used."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    context_tokens: int
    """Longest text that it may see."""
    described: str
    """What it was loaded from."""


def load_source(source: Path, checkpoint: str = "best", device: str = "auto") -> Loaded:
    """The model in a run, a checkpoint, a `.nemo` file or a Hugging Face folder.

    Raises:
        UserError: it is none of these, or damaged.
    """
    source, target = Path(source), _resolve_device(device)
    if checkpoint not in ("best", "latest"):
        raise UserError("checkpoint", f"is {checkpoint!r}", "best or latest")
    if source.is_file():
        loaded = _from_nemo(source)
    elif (source / CONFIG_NAME).is_file():
        loaded = _from_hf(source)
    elif RunFolder(source).checkpoints.is_dir():
        store = CheckpointStore(RunFolder(source).checkpoints)
        # Before the first validation none is marked as the best.
        loaded = _from_checkpoint(store.find(checkpoint) or store.choose("latest"))
    elif source.is_dir() and source.parent == RunFolder(source.parent.parent).checkpoints:
        loaded = _from_checkpoint(CheckpointStore(source.parent).choose(source.name))
    else:
        raise UserError(source, "does not exist" if not source.exists() else "holds no model", MODEL_SOURCES)
    moved(loaded.model, target, torch.bfloat16 if target.type == "cuda" else torch.float32)
    return loaded


def _from_nemo(path: Path) -> Loaded:
    with open_archive(path) as archive:
        tokenizer, shape = archive.tokenizer(), archive.config.gpt
        weights = to_llama(archive.weights(), shape, archive.config.vocab_size)
    config = llama_config(shape, archive.config.vocab_size, tokenizer.eos_id, None, "float32")
    return Loaded(build_llama(weights, config, path), tokenizer, shape.max_position_embeddings, str(path))


def _from_hf(path: Path) -> Loaded:
    folder = open_hf_folder(path)
    model = build_llama(folder.weights(), folder.config, folder.weights_path)
    return Loaded(model, folder.tokenizer(), model.config.max_position_embeddings, str(path))


def _from_checkpoint(checkpoint: Checkpoint) -> Loaded:
    from yxanul_nemo.checkpoint.restore import restore_model
    from yxanul_nemo.model.build import reference_precision

    # What it was trained with, whatever the run is configured for now.
    config = load_run_config(checkpoint.path / "config.yaml")
    tokenizer = Tokenizer.load_known(
        RunFolder(checkpoint.path.parent.parent).tokenizer,
        checkpoint.read_ledger().tokenizer_fingerprint,
        user=str(checkpoint.path),
    )
    model = restore_model(config, checkpoint, tokenizer.vocab_size, *reference_precision())
    shape = model.model_shape
    weights = to_llama(model.state_dict(), shape, tokenizer.vocab_size)
    llama = build_llama(weights, llama_config(shape, tokenizer.vocab_size, tokenizer.eos_id, None, "float32"))
    return Loaded(llama, tokenizer, shape.max_position_embeddings, str(checkpoint.path))


def _resolve_device(device: str) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError("device", f"is {device!r}", "auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("device", "is cuda, but torch finds no GPU", "an NVIDIA GPU and its driver", "Use cpu.")
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
