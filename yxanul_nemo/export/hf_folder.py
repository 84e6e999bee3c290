"""Reading a Hugging Face folder of a Llama, as data: no code in it is run, and its weights are complete or refused."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from yxanul_nemo.errors import UserError
from yxanul_nemo.export.llama_shape import LlamaShape
from yxanul_nemo.files import fingerprint, sha256_file
from yxanul_nemo.json_files import read_json, read_json_object
from yxanul_nemo.model.whole_weights import require_shapes, require_weights
from yxanul_nemo.unpacking.safe_weights import open_safetensors

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
NUMBER_FORMATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types of numbers that weights may have."""
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 4 << 20
_PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class HfFolder:
    """A folder with config.json, weights in one safetensors file or in several with an index, and a tokenizer."""

    path: Path
    config: dict[str, Any]
    """`config.json` as it was found, of which only what `shape` has is used."""
    shape: LlamaShape

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
        """Name -> tensor on the CPU, in the number format of the files.

        Raises:
            UserError: a file is absent or damaged, or its header or its values are not those of the model that `config.json`
                describes. Headers are compared before any weights are read.
        """
        expected = None if self.weights_path.name == WEIGHTS_NAME else self._index()
        with ExitStack() as stack:
            handles = {path: stack.enter_context(_opened(path)) for path in self.weight_files()}
            shapes: dict[str, tuple[int, ...]] = {}
            for path, handle in handles.items():
                part = _shapes(path, handle)
                if expected is not None:
                    _require_as_indexed(path, part, expected)
                shapes |= part
            require_shapes(shapes, self.shape.weights(), self.weights_path)
            found: dict[str, Tensor] = {}
            for path, handle in handles.items():
                with _damage(path):
                    found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - it is no mapping
        require_weights(found, shapes, self.weights_path)
        return found

    def digest(self) -> str:
        """SHA-256 of the weights: of the file, or of the hashes of all files, in the order of their names."""
        hashes = [sha256_file(path) for path in self.weight_files()]
        return hashes[0] if len(hashes) == 1 else fingerprint(hashes)

    def _index(self) -> dict[str, str]:
        path = self.path / INDEX_NAME
        index = read_json(path, "an index of safetensors files", max_bytes=MAX_INDEX_BYTES)
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
        if tokenizer.vocab_size > self.shape.vocab_size:
            raise UserError(
                self.path,
                f"its tokenizer has {tokenizer.vocab_size:,} ids",
                f"at most {self.shape.vocab_size:,}, the model's",
            )
        return tokenizer


def open_hf_folder(path: Path) -> HfFolder:
    """Read config.json; UserError if this is no folder of a Llama."""
    config = read_json_object(path / CONFIG_NAME, "a Hugging Face folder", max_bytes=MAX_CONFIG_BYTES)
    return HfFolder(path, config, LlamaShape.of(config, path / CONFIG_NAME))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(path, f"is no safetensors file ({error})", "weights written by stage=export") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(path, "does not exist", f"the weights as safetensors ({WEIGHTS_NAME} or {INDEX_NAME})")
    with _damage(path):
        handle = open_safetensors(path)
    with handle:
        yield handle


def _shapes(path: Path, handle: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a file's tensors, from its header; UserError where one is of another type than `NUMBER_FORMATS`."""
    found = {}
    with _damage(path):
        for name in handle.keys():  # noqa: SIM118 - it is no mapping
            described = handle.get_slice(name)
            if described.get_dtype() not in NUMBER_FORMATS:
                raise UserError(path, f"has '{name}' as {described.get_dtype()}", ", ".join(NUMBER_FORMATS))
            found[name] = tuple(described.get_shape())
    return found


def _require_as_indexed(path: Path, names: Collection[str], expected: Mapping[str, str]) -> None:
    """What the index says and what the files hold must be the same; a tensor never comes from a file by chance."""
    for name in names:
        if expected.get(name) != path.name:
            raise UserError(path, f"holds '{name}', which {INDEX_NAME} gives to {expected.get(name)}")
    for name, file in expected.items():
        if file == path.name and name not in names:
            raise UserError(path, f"lacks '{name}'", f"what {INDEX_NAME} says")
