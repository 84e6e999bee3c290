"""What a `.nemo` file of this project holds, read without NeMo: each part is checked before anything is made of it.

Such files are shared, so this one may be hostile: nothing in it is executed, no path in it is followed out of it.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.tokenizer_libraries import LibraryName
from yxanul_nemo.config.model import ModelConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.json_files import MAX_TOKENIZER_BYTES, read_json
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.model.whole_weights import require_weights, weight_shapes
from yxanul_nemo.run_folder import TOKENIZER_RECORD
from yxanul_nemo.stored import Stored, first_problem
from yxanul_nemo.unpacking.safe_config import MAX_CONFIG_BYTES, read_config
from yxanul_nemo.unpacking.safe_tar import safe_extract
from yxanul_nemo.unpacking.safe_weights import pickled_problems

TARGET = "yxanul_nemo.model.nemo_model.YxanulModel"
CONFIG_MEMBER, WEIGHTS_MEMBER = "model_config.yaml", "model_weights.ckpt"
WEIGHT_PREFIX = "gpt."
TOKENIZER_FILES = {
    "tokenizer_json": "tokenizer.json",
    "sentencepiece_model": "tokenizer.model",
    "tokenizer_config": "tokenizer_config.json",
    "special_tokens_map": "special_tokens_map.json",
}
"""Key in the configuration -> name in a tokenizer's folder."""
ALLOWED_MEMBERS = (CONFIG_MEMBER, WEIGHTS_MEMBER, *(f"*_{name}" for name in TOKENIZER_FILES.values()))
OVERHEAD_BYTES, TENSOR_OVERHEAD_BYTES = 1 << 20, 4096
"""Most that torch.save writes beside the numbers, in all and for each tensor."""
ARTIFACT = "nemo:"
"""NeMo writes `nemo:<32 hex digits>_<name>` where the configuration names a file of the archive."""
MADE_BY = "a .nemo file written by stage=export"


class TokenizerPart(Stored):
    """The tokenizer's files: `nemo:` names inside an archive, paths outside of one."""

    fingerprint: str
    """`Tokenizer.fingerprint` of the tokenizer that the model was trained with."""
    library: LibraryName
    """Which library reads it; a sentencepiece tokenizer has a tokenizer.json beside it, for transformers."""
    tokenizer_json: str | None = None
    sentencepiece_model: str | None = None
    tokenizer_config: str | None = None
    special_tokens_map: str | None = None

    @property
    def files(self) -> dict[str, str]:
        """Key of `TOKENIZER_FILES` -> path or `nemo:` name, for those that there are."""
        return {key: value for key in TOKENIZER_FILES if (value := getattr(self, key)) is not None}


class NemoConfig(Stored):
    """`model_config.yaml`."""

    gpt: ModelConfig
    vocab_size: int = Field(ge=1, le=2**24)
    """Ids of the tokenizer; the embedding has more rows (`gpt.vocab_pad_multiple`)."""
    tokenizer: TokenizerPart
    target: str = TARGET
    """The class that reads the file; NeMo writes it."""
    nemo_version: str | None = None

    @model_validator(mode="after")
    def _has_tokenizer(self) -> Self:
        if self.tokenizer.tokenizer_json is None and self.tokenizer.sentencepiece_model is None:
            raise ValueError("tokenizer: neither tokenizer_json nor sentencepiece_model is there")
        return self


def parse_config(plain: object, where: object) -> NemoConfig:
    """Check a configuration's keys and values; UserError names the first wrong one."""
    try:
        return NemoConfig.model_validate(plain)
    except ValidationError as error:
        raise UserError(f"{where} ({CONFIG_MEMBER})", str(first_problem(error)), MADE_BY) from None


def load_tokenizer(part: TokenizerPart, files: Mapping[str, Path], where: object) -> Tokenizer:
    """The tokenizer of `part`, from `files` (key of `TOKENIZER_FILES` -> path).

    Raises:
        UserError: it cannot be read, or is not the one of `part.fingerprint`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_json_atomic(folder / TOKENIZER_RECORD, {"library": part.library})
        try:
            for key, source in files.items():
                place = folder / TOKENIZER_FILES[key]
                shutil.copyfile(source, place)
                if place.suffix == ".json" and not isinstance(read_json(place, max_bytes=MAX_TOKENIZER_BYTES), dict):
                    raise UserError(place, "is no JSON object")
            tokenizer = Tokenizer.load(folder)
        except UserError as error:
            raise UserError(
                f"{where} (tokenizer)", f"{Path(error.where).name}: {error.problem}", error.expected
            ) from None
        except OSError as error:
            raise UserError(f"{where} (tokenizer)", f"{error.filename} cannot be read ({error.strerror})") from None
    if tokenizer.fingerprint != part.fingerprint:
        raise UserError(
            f"{where} (tokenizer)",
            f"has the fingerprint {tokenizer.fingerprint[:16]}",
            f"{part.fingerprint[:16]}, which the model was trained with",
        )
    return tokenizer


@dataclass(frozen=True)
class NemoArchive:
    """An unpacked archive whose configuration and list of members are checked; weights and tokenizer are when read."""

    path: Path
    folder: Path
    """Where it is unpacked, for as long as `open_archive` is open."""
    config: NemoConfig

    def tokenizer_files(self) -> dict[str, Path]:
        """Key of `TOKENIZER_FILES` -> unpacked file."""
        return {key: self.folder / name.removeprefix(ARTIFACT) for key, name in self.config.tokenizer.files.items()}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; UserError if it is not the model's."""
        return load_tokenizer(self.config.tokenizer, self.tokenizer_files(), self.path)

    def weights(self) -> dict[str, Tensor]:
        """The GPT's weights by Megatron-core's names, on the CPU, in the number format of the file; UserError if not all."""
        where = f"{self.path} ({WEIGHTS_MEMBER})"
        weights = unprefixed(read_weights(self.folder / WEIGHTS_MEMBER, where), where)
        require_weights(weights, weight_shapes(self.config.gpt, self.config.vocab_size), where)
        return weights


@contextmanager
def open_archive(path: Path) -> Iterator[NemoArchive]:
    """Unpack a `.nemo` file into a temporary folder and check what it is.

    Raises:
        UserError: no such file, an unsafe or damaged archive, members that its configuration does not name, or a configuration
            of something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(path, "does not exist", "a .nemo file")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nemo"
        members = safe_extract(
            path,
            folder,
            ALLOWED_MEMBERS,
            check_member=lambda name, size, before: _check_member(path, name, size, before),
        )
        for name in (CONFIG_MEMBER, WEIGHTS_MEMBER):
            if name not in members:
                raise UserError(path, f"holds no {name}", MADE_BY)
        config = _read_config(path, folder)
        _require_members(path, config, set(members))
        yield NemoArchive(path, folder, config)


def _read_config(path: Path, folder: Path) -> NemoConfig:
    return parse_config(read_config(folder / CONFIG_MEMBER, allowed_targets=(TARGET,)), path)


def _check_member(path: Path, name: str, size_bytes: int, folder: Path) -> None:
    """Refuse a member of a size that it cannot have, before it fills the disk; `folder` holds the members before it."""
    least, most = 0, MAX_TOKENIZER_BYTES
    if name == CONFIG_MEMBER:
        most = MAX_CONFIG_BYTES
    elif name == WEIGHTS_MEMBER:
        if not (folder / CONFIG_MEMBER).is_file():
            raise UserError(path, f"holds no {CONFIG_MEMBER} before its {WEIGHTS_MEMBER}", MADE_BY)
        config = _read_config(path, folder)
        least = parameter_count(config.gpt, config.gpt.padded_vocab_size(config.vocab_size))
        # In FP64, and what torch.save writes beside the numbers.
        most = 8 * least + OVERHEAD_BYTES + TENSOR_OVERHEAD_BYTES * len(weight_shapes(config.gpt, config.vocab_size))
    if not least <= size_bytes <= most:
        raise UserError(
            f"{path} ({name})", f"has {size_bytes:,} bytes", f"{least:,} to {most:,}, going by {CONFIG_MEMBER}"
        )


def unprefixed(weights: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The weights of a YxanulModel as those of its GPT; UserError if it has others."""
    foreign = [name for name in weights if not name.startswith(WEIGHT_PREFIX)]
    if foreign:
        raise UserError(where, f"has the unknown '{foreign[0]}'", f"names that begin with {WEIGHT_PREFIX}")
    return {name.removeprefix(WEIGHT_PREFIX): weight for name, weight in weights.items()}


def read_weights(path: Path, where: object) -> dict[str, Tensor]:
    """A state dict written by `torch.save`, read as tensors and nothing else, on the CPU.

    `weights_only=True` is given explicitly: the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which NeMo's own reader
    obeys (nemo_toolkit 3.0), then has no effect (torch 2.11).

    Raises:
        UserError: it is damaged, or holds anything but floating-point tensors by name.
    """
    expected, fix = "a file of tensors written by torch.save", "Do not use this file; get it from its maker."
    try:
        problem = next(pickled_problems(path), None)
        if problem is not None:
            raise UserError(where, f"cannot be read as tensors: it {problem}", expected, fix)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged and hostile bytes end in any of a dozen kinds
        first_line = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            where, f"cannot be read as tensors ({type(error).__name__}: {first_line})", expected, fix
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(where, f"holds a {type(loaded).__name__}", expected, fix)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(where, f"holds a {type(value).__name__} as {repr(name)[:200]}", expected, fix)
        if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(where, f"has '{name}' as {value.dtype}, {value.layout}, {value.device}", expected, fix)
    return loaded


def is_artifact(key: str, value: str) -> bool:
    """Whether `value` names the file of `key`, of `TOKENIZER_FILES`, inside an archive; such a name leads nowhere else."""
    return re.fullmatch(rf"{ARTIFACT}[0-9a-f]{{32}}_{re.escape(TOKENIZER_FILES[key])}", value, re.ASCII) is not None


def _require_members(path: Path, config: NemoConfig, members: set[str]) -> None:
    """The archive holds the files that its configuration names, and no others."""
    named = {CONFIG_MEMBER, WEIGHTS_MEMBER}
    for key, value in config.tokenizer.files.items():
        if not is_artifact(key, value):
            raise UserError(
                f"{path} ({CONFIG_MEMBER})",
                f"tokenizer.{key} is {value[:80]!r}",
                f"{ARTIFACT}<32 hex digits>_{TOKENIZER_FILES[key]}, a file of the archive",
                "Do not use this file; get it from its maker.",
            )
        named.add(value.removeprefix(ARTIFACT))
    if missing := sorted(named - members):
        raise UserError(path, f"holds no {missing[0]}", "the files that its configuration names")
    if foreign := sorted(members - named):
        raise UserError(path, f"has an unknown member '{foreign[0]}'", "the files that its configuration names")
