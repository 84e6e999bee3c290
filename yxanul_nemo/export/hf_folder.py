"""Reading a Hugging Face folder of a Llama, as data: no code in it is run, and its weights are complete or refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_libraries import read_json
from yxanul_nemo.errors import UserError

MODEL_TYPES = ("llama", "yxanul")
"""A standard Llama, and one with the factorized embedding of `modeling_yxanul.py`."""
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


@dataclass(frozen=True)
class HfFolder:
    """A folder with config.json, model.safetensors and a tokenizer."""

    path: Path
    config: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """Name -> tensor on the CPU, in the number format of the file; UserError if it is damaged."""
        path = self.path / WEIGHTS_NAME
        if not path.is_file():
            raise UserError(path, "does not exist", "the weights in one safetensors file")
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(path, f"is no safetensors file ({error})", "weights written by stage=export") from None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; UserError if it cannot be read or has more ids than the model."""
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.vocab_size > self.config["vocab_size"]:
            raise UserError(
                self.path,
                f"its tokenizer has {tokenizer.vocab_size:,} ids",
                f"at most {self.config['vocab_size']:,}, the model's",
            )
        return tokenizer


def open_hf_folder(path: Path) -> HfFolder:
    """Read config.json; UserError if this is no folder of a Llama."""
    config = read_json(path / CONFIG_NAME, "a Hugging Face folder")
    if not isinstance(config, dict):
        raise UserError(path / CONFIG_NAME, "is no JSON object", "a model's configuration")
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(path / CONFIG_NAME, f"model_type is {config.get('model_type')!r}", " or ".join(MODEL_TYPES))
    if not isinstance(config.get("vocab_size"), int):
        raise UserError(path / CONFIG_NAME, f"vocab_size is {config.get('vocab_size')!r}", "a whole number")
    return HfFolder(path, config)
