"""Reading a Hugging Face folder of a Llama, as data: no code in it is run, and its weights are complete or refused."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.tokenizer_libraries import read_json
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import fingerprint, sha256_file

MODEL_TYPES = ("llama", "yxanul")
"""A standard Llama, and one with the factorized embedding of `modeling_yxanul.py`."""
CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
_PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class HfFolder:
    """A folder with config.json, weights in one safetensors file or in several with an index, and a tokenizer."""

    path: Path
    config: dict[str, Any]

    @property
    def weights_path(self) -> Path:
        """The file of the weights, or the index of their files where they are split over several."""
        index = self.path / INDEX_NAME
        return index if index.is_file() and not (self.path / WEIGHTS_NAME).is_file() else self.path / WEIGHTS_NAME

    def weight_files(self) -> list[Path]:
        """The files that hold weights; UserError if there are none, or the index names others than files of this folder."""
        path = self.weights_path
        if path.name == WEIGHTS_NAME:
            return [path]
        return [self.path / name for name in sorted(set(self._index().values()))]

    def weights(self) -> dict[str, Tensor]:
        """Name -> tensor on the CPU, in the number format of the files; UserError if one is absent or damaged."""
        found: dict[str, Tensor] = {}
        expected = None if self.weights_path.name == WEIGHTS_NAME else self._index()
        for path in self.weight_files():
            if not path.is_file():
                raise UserError(path, "does not exist", f"the weights as safetensors ({WEIGHTS_NAME} or {INDEX_NAME})")
            try:
                part = load_file(path)
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(path, f"is no safetensors file ({error})", "weights written by stage=export") from None
            if expected is not None:
                # What the index says and what the files hold must be the same; a tensor never comes from a file by chance.
                for name in part:
                    if expected.get(name) != path.name:
                        raise UserError(path, f"holds '{name}', which {INDEX_NAME} gives to {expected.get(name)}")
                for name, file in expected.items():
                    if file == path.name and name not in part:
                        raise UserError(path, f"lacks '{name}'", f"what {INDEX_NAME} says")
            found |= part
        return found

    def digest(self) -> str:
        """SHA-256 of the weights: of the file, or of the hashes of all files, in the order of their names."""
        hashes = [sha256_file(path) for path in self.weight_files()]
        return hashes[0] if len(hashes) == 1 else fingerprint(hashes)

    def _index(self) -> dict[str, str]:
        path = self.path / INDEX_NAME
        index = read_json(path, "an index of safetensors files")
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not files:
            raise UserError(path, "has no weight_map", "name of a weight -> file of this folder")
        for name, file in files.items():
            # The index is foreign: it names files beside itself, and nothing else.
            if not isinstance(file, str) or _PART_NAME.fullmatch(file) is None:
                raise UserError(path, f"gives '{name}' to {file!r}", "a .safetensors file of this folder")
        return files

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
