"""Writing a model's folder for Hugging Face and its `.nemo` file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.export.fold import llama_config, to_llama
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.model.nemo_model import YxanulModel, nemo_config


def write_hf(folder: Path, model: YxanulGPT, tokenizer: Tokenizer, dtype: torch.dtype, card: str) -> None:
    """A standard Llama folder: config.json, model.safetensors, tokenizer files, generation_config.json, README.md."""
    shape: ModelConfig = model.model_shape
    folder.mkdir(parents=True)
    weights = {name: weight.to(dtype) for name, weight in to_llama(model.state_dict(), shape, tokenizer.vocab_size).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    dtype_name = str(dtype).removeprefix("torch.")
    config = llama_config(shape, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, dtype_name)
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    _write_json(folder / "generation_config.json", generation)
    tokenizer.save(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_nemo(path: Path, model: YxanulGPT, tokenizer_folder: Path, dtype: torch.dtype) -> None:
    """A `.nemo` file through NeMo's own `save_to`."""
    wrapped = YxanulModel(nemo_config(model.model_shape, model.real_vocab_size, tokenizer_folder))
    weights: dict[str, Tensor] = {f"gpt.{name}": value for name, value in model.state_dict().items() if value is not None}
    wrapped.load_state_dict({name: weights[name] for name in wrapped.state_dict()})
    wrapped.to(dtype).save_to(str(path))


def model_card(shape: ModelConfig, vocab_size: int, tokens: int, recipe: str, validation: dict[str, Any] | None) -> str:
    """README.md of the Hugging Face folder, with the run's own figures."""
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {shape.name}", "",
        f"A {shape.num_layers}-layer GPT ({shape.hidden_size} wide, {shape.num_attention_heads} heads, {shape.kv_groups} key/value groups, "
        f"vocabulary of {vocab_size:,}), trained on {tokens:,} tokens with the recipe `{recipe}`.",
        "",
        "It was trained with a factorized tied embedding, which is folded here into one table, so this is a standard Llama:",
        "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")', 'tokenizer = AutoTokenizer.from_pretrained("PATH")', "```", "",
    ]  # fmt: skip
    if validation is not None:
        lines += [f"Held-out text, windows of {validation['eval_len_tokens']} tokens:", "", "| domain | bits per byte | perplexity |", "|---|---|---|"]
        lines += [
            f"| {name} | {score['bits_per_byte']:.4f} | {score['perplexity']:.2f} |" for name, score in validation["domains"].items()
        ]
    return "\n".join(lines) + "\n"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
