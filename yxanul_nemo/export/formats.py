"""Writing a model's folder for Hugging Face and its `.nemo` file."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.export.fold import factorized_config, llama_config, to_llama
from yxanul_nemo.files import allow_as_umask
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.model.gpt import YxanulGPT
from yxanul_nemo.model.nemo_archive import WEIGHT_PREFIX

MODELLING_CODE = Path(__file__).with_name("modeling_yxanul.py")
NORMAL_95 = 1.96
"""Standard errors on each side of a mean that 95% of a normal distribution are within."""


def write_hf(
    folder: Path, model: YxanulGPT, tokenizer: Tokenizer, dtype: torch.dtype, factorized: bool = False
) -> None:
    """Write a folder that transformers loads: config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Args:
        folder: made here.
        factorized: keep the embedding's two small matrices, with the code that reads them; otherwise a standard Llama.
    """
    shape, vocab_size = model.model_shape, tokenizer.vocab_size
    folder.mkdir(parents=True)
    weights = to_llama(model.state_dict(), shape, vocab_size, factorized)
    path = folder / "model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, path, metadata={"format": "pt"})
    # safetensors makes its files readable by their owner alone.
    allow_as_umask(path)
    dtype_name = str(dtype).removeprefix("torch.")
    # Not EOS: fine-tuning with transformers leaves the embedding of the padding token as it is.
    pad_id = None if tokenizer.pad_token is None else tokenizer.pad_id
    config = llama_config(shape, vocab_size, tokenizer.eos_id, pad_id, dtype_name)
    if factorized:
        config = factorized_config(config, shape.embedding_rank)
        shutil.copyfile(MODELLING_CODE, folder / MODELLING_CODE.name)
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    _write_json(folder / "generation_config.json", generation)
    tokenizer.save(folder, for_prompts=True)
    _add_to_json(folder / "tokenizer_config.json", {"model_max_length": shape.max_position_embeddings})


def write_nemo(path: Path, model: YxanulGPT, tokenizer: Tokenizer, tokenizer_folder: Path, dtype: torch.dtype) -> None:
    """Write a `.nemo` file through NeMo's own `save_to`; `tokenizer` is saved in `tokenizer_folder`."""
    from yxanul_nemo.model.nemo_model import YxanulModel, nemo_config, quiet_nemo, weights_to_come

    weights = {
        f"{WEIGHT_PREFIX}{name}": value for name, value in model.state_dict().items() if isinstance(value, Tensor)
    }
    with quiet_nemo(), weights_to_come():
        wrapped = YxanulModel(nemo_config(model.model_shape, model.real_vocab_size, tokenizer, tokenizer_folder))
        wrapped.load_state_dict(weights)
        wrapped.to(dtype).save_to(str(path))


def model_card(
    shape: ModelConfig,
    *,
    vocab_size: int,
    eos_token: str,
    tokens: int,
    recipe: str,
    checkpoint: str,
    dtype: str,
    factorized: bool,
    license_name: str,
    datasets: Mapping[str, str],
    parity: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
) -> str:
    """README.md of the Hugging Face folder, with the run's own figures.

    Args:
        license_name: of the model, as the hub abbreviates it.
        datasets: data sets of the hub that it was trained on -> their licences.
        parity: of this folder, as `check_parity` gives it.
        validation: of the exported checkpoint, as `validation.validate` gives it; None if it was not validated.
    """
    parameters = parameter_count(shape, vocab_size)
    trust = ", trust_remote_code=True" if factorized else ""
    embedding = (
        f"Its tied embedding is a pair of small matrices of rank {shape.embedding_rank}, read by `modeling_yxanul.py` in this folder."
        if factorized
        else f"It was trained with a factorized tied embedding of rank {shape.embedding_rank}, which is multiplied out here into "
        "one table, so this is a standard Llama."
    )
    figures = {
        "parameters (as trained)": f"{parameters:,}",
        "layers, width, feed-forward width": f"{shape.num_layers}, {shape.hidden_size}, {shape.ffn_hidden_size}",
        "attention heads, key/value heads": f"{shape.num_attention_heads}, {shape.kv_groups}",
        "vocabulary": f"{vocab_size:,}",
        "context (tokens)": f"{shape.max_position_embeddings:,}",
        "trained on (tokens)": f"{tokens:,}",
        "recipe, checkpoint": f"`{recipe}`, `{checkpoint}`",
        "number format": dtype,
        "licence of the model": license_name,
        **{f"licence of the text from {name}": words for name, words in datasets.items()},
        "largest logit difference from the checkpoint": f"{max(parity['max_logit_difference'], parity['rounding_logit_difference']):.2g}",
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"license: {license_name}"]
    lines += ["datasets:", *(f"- {name}" for name in datasets)] if datasets else []
    lines += ["---", f"# {shape.name}", ""]
    lines += [
        "A GPT with grouped-query attention, RMSNorm, SwiGLU and rotary positions. " + embedding,
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value} |" for name, value in figures.items()]
    lines += [
        "",
        f"Every text stood behind `{eos_token}` in training, so the tokenizer puts it before a prompt:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'prompt = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0], skip_special_tokens=True))",
        "```",
        "",
    ]  # fmt: skip
    if validation is not None:
        lines += held_out_lines(validation)
    return "\n".join(lines).rstrip() + "\n"


def held_out_lines(validation: Mapping[str, Any]) -> list[str]:
    """Return the lines of the card about a checkpoint's validation, as `validation.validate` gives it."""
    lines = [
        f"Held-out text, windows of {validation['eval_len_tokens']} tokens with stride {validation['stride_tokens']}:",
        "",
        "| domain | documents | bits per byte | 95% interval | perplexity |",
        "|---|---|---|---|---|",
    ]
    for name, score in validation["domains"].items():
        value, margin = score["bits_per_byte"], NORMAL_95 * score["bits_per_byte_standard_error"]
        # A single document says nothing of how documents vary.
        interval = f"{value - margin:.4f} to {value + margin:.4f}" if margin else "-"
        lines.append(f"| {name} | {score['documents']} | {value:.4f} | {interval} | {score['perplexity']:.2f} |")
    return lines


def _add_to_json(path: Path, values: Mapping[str, Any]) -> None:
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | dict(values))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
