"""Small good models from elsewhere, made in a moment without a run: by transformers, by torch.save and tar, by gguf's writer."""

import json
import shutil
import tarfile
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.export.fold import llama_config, to_llama
from yxanul_nemo.export.gguf_file import write_gguf
from yxanul_nemo.model.nemo_archive import CONFIG_MEMBER, TARGET, WEIGHT_PREFIX, WEIGHTS_MEMBER
from yxanul_nemo.model.whole_weights import weight_shapes

VOCAB = 298
SHAPE = ModelConfig(
    name="small", num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, kv_groups=1, head_dim=8, embedding_rank=8,
    max_position_embeddings=2048,
)  # fmt: skip


def hf_folder(folder: Path, tokenizer_folder: Path) -> Path:
    """A Llama as transformers itself saves one, with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


def weights() -> dict[str, torch.Tensor]:
    """Random ones of `SHAPE`."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in weight_shapes(SHAPE, VOCAB).items()}


def nemo_file(path: Path, tokenizer_folder: Path) -> Path:
    """An archive as NeMo packs one."""
    folder = path.with_suffix(".folder")
    folder.mkdir()
    names = {"tokenizer_json": "tokenizer.json", "special_tokens_map": "special_tokens_map.json"}
    for file in names.values():
        shutil.copy(tokenizer_folder / file, folder / f"{'0' * 32}_{file}")
    config = {
        "gpt": SHAPE.model_dump(),
        "vocab_size": VOCAB,
        "tokenizer": {
            "fingerprint": Tokenizer.load(tokenizer_folder).fingerprint,
            "library": "tokenizers",
            **{key: f"nemo:{'0' * 32}_{file}" for key, file in names.items()},
        },
        "target": TARGET,
    }
    (folder / CONFIG_MEMBER).write_text(yaml.safe_dump(config))
    torch.save({f"{WEIGHT_PREFIX}{name}": weight for name, weight in weights().items()}, folder / WEIGHTS_MEMBER)
    with tarfile.open(path, "w:") as archive:
        archive.add(folder, arcname=".")
    shutil.rmtree(folder)
    return path


def gguf_file(path: Path, tokenizer_folder: Path) -> Path:
    """llama.cpp's file of the same model."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    config = llama_config(SHAPE, VOCAB, tokenizer.eos_id, None, "float32")
    folded = to_llama(weights(), SHAPE, VOCAB)
    write_gguf(path, folded, config, tokenizer, tokenizer_folder, torch.float32, "small")
    return path


def changed_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
