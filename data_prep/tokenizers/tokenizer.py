"""One interface to a run's tokenizer, whatever made it, and the building of it into the run's folder, once."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from data_prep.tokenizers.superbpe import build_superbpe
from data_prep.tokenizers.superbpe_training import train_bpe, train_superbpe
from data_prep.tokenizers.superword_encoder import SuperwordEncoder
from data_prep.tokenizers.tokenizer_libraries import (
    LIBRARIES,
    PROBES,
    Library,
    LibraryName,
    TokenizersLibrary,
    open_library,
)
from yxanul_nemo.config.data import TokenizerConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.file_locks import only_process
from yxanul_nemo.files import fingerprint, fsync_dir, sha256_file, write_json_atomic
from yxanul_nemo.hub import HubRepo
from yxanul_nemo.json_files import read_json_object
from yxanul_nemo.log import logger
from yxanul_nemo.run_folder import TOKENIZER_RECORD

RECORD_TYPES = {
    "fingerprint": str,
    "eos_token": str,
    "pad_token": str | None,
    "settings": dict,
    "source": dict,
}
"""What the record of a tokenizer that was built for a run holds at least."""
FIX_RECORD = "Copy the folder again, or build it again with stage=data in a new run.dir."
JSON_AND_TEXT_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""Files that can decide a tokenizer, beside sentencepiece models."""


class Tokenizer:
    """Text to ids and back. No special token is ever added, and the text of one is encoded as plain text.

    Threads may share a tokenizer, and the `tokenizers` library itself spreads a batch over all cores unless
    TOKENIZERS_PARALLELISM=false is set before its first batch. Processes that are forked after a first batch must set it;
    started with `spawn` they load the folder themselves. After some MB of text a SuperBPE tokenizer prepares a faster way to
    the same ids (`superword_encoder`), which takes a second, about 100 MB of memory, and one core: threads wait for each other.
    """

    def __init__(self, library: Library, eos_token: str, pad_token: str | None, source: object):
        """Bind `library` to its special tokens; UserError (naming `source`) if it has no such token."""
        self._library = library
        self.library: LibraryName = library.name
        """Library that does the work: `tokenizers` or `sentencepiece`."""
        self.eos_token, self.pad_token = eos_token, pad_token
        self.vocab_size: int = library.vocab_size
        """Number of ids, special ones included: one above the highest id."""
        self.eos_id: int = _token_id(library, eos_token, "eos_token", source)
        """Id that ends each document."""
        self.pad_id: int = self.eos_id if pad_token is None else _token_id(library, pad_token, "pad_token", source)
        """Id of padding; `eos_id` where the tokenizer has none of its own."""

    @classmethod
    def load(cls, path: Path, eos_token: str | None = None, pad_token: str | None = None) -> Self:
        """Load a folder (tokenizer.json or a .model file) or a .model file.

        Special tokens that are not named here are read from the folder's special_tokens_map.json or tokenizer_config.json.
        UserError if the tokenizer cannot be read, or has no end-of-document token.
        """
        path = Path(path)
        named = named_specials(path)
        eos_token = eos_token or named.get("eos_token")
        library = open_library(path, _recorded_library(path / TOKENIZER_RECORD))
        if eos_token is None:
            raise UserError(path, "does not say which token ends a document", "eos_token", "Set tokenizer.eos_token.")
        return cls(library, eos_token, pad_token or named.get("pad_token"), path)

    @classmethod
    def load_known(cls, folder: Path, fingerprint: str, user: str = "the data") -> Self:
        """Load the tokenizer that something was made with.

        Args:
            folder: of the tokenizer.
            fingerprint: which it must have.
            user: what was made with it, for the message.

        Raises:
            UserError: it cannot be read, or is another one.
        """
        tokenizer = cls.load(folder)
        if tokenizer.fingerprint != fingerprint:
            raise UserError(
                folder,
                f"is not the tokenizer of {user}",
                fix="Run `python launcher.py stage=data` again, or copy it back.",
            )
        return tokenizer

    @classmethod
    def wrap(cls, made: tokenizers.Tokenizer, eos_token: str, pad_token: str | None, source: object) -> Self:
        """Take over a tokenizer made by this project, which is byte-level and so gives every text back."""
        tokenizer = cls(TokenizersLibrary(made, source), eos_token, pad_token, source)
        assert tokenizer.is_lossless(), "a byte-level BPE without normalizer gives every text back"
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 of shape [tokens]."""
        return self._library.encode_batch(list(texts))

    def bulk_encoder(self) -> SuperwordEncoder | None:
        """The faster way to the same ids, which is used from now on; None if there is none for this tokenizer."""
        return self._library.bulk_encoder()

    def use_bulk_encoder(self, encoder: SuperwordEncoder | None) -> None:
        """Take over what `bulk_encoder` gave for the same tokenizer in another process."""
        self._library.use_bulk_encoder(encoder)

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32 of shape [tokens]."""
        return self._library.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens as their text: the exact inverse of `encode` if `is_lossless`.

        A run of ids that starts or ends inside a character gives U+FFFD there.
        """
        return self._library.decode(np.asarray(ids, dtype=np.int64).tolist())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over vocabulary, merges, rules and special tokens; the same however the files are laid out."""
        return fingerprint({"rules": self._library.rules(), "eos_id": self.eos_id, "pad_id": self.pad_id})

    def is_lossless(self) -> bool:
        """Whether hard text comes back unchanged. A normalizing tokenizer (most sentencepiece models) gives False."""
        return all(self.decode(self.encode(text)) == text for text in PROBES)

    def save(self, folder: Path, *, for_prompts: bool = False) -> None:
        """Write a folder that `Tokenizer.load` and `transformers.AutoTokenizer` read and give the same ids with.

        Args:
            folder: made where it does not exist.
            for_prompts: beside a model that others use. transformers then puts EOS before each text, as every document stood
                behind one in training, and pads with EOS where there is no padding token.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._library.write(folder, self.eos_token if for_prompts else None)
        specials = {"eos_token": self.eos_token}
        if for_prompts:
            specials["bos_token"] = self.eos_token
        if self.pad_token is not None or for_prompts:
            specials["pad_token"] = self.pad_token or self.eos_token
        write_json_atomic(folder / "special_tokens_map.json", specials)
        # split_special_tokens: transformers too reads the text of a special token as text, as the training data was read.
        write_json_atomic(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "split_special_tokens": True,
                # transformers before 5 would add token_type_ids, which a Llama refuses; generation goes on at the right end.
                "model_input_names": ["input_ids", "attention_mask"],
                "padding_side": "left",
                **specials,
            },
        )
        write_json_atomic(folder / TOKENIZER_RECORD, self.record())

    def record(self) -> dict[str, Any]:
        """What identifies the tokenizer, JSON-able."""
        return {
            "library": self.library,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
        }


def _token_id(library: Library, token: str, key: str, source: object) -> int:
    number = library.token_to_id(token)
    if number is None:
        usual = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<pad>", "<s>")
        has = [name for name in usual if library.token_to_id(name) is not None]
        raise UserError(
            source,
            f"has no token '{token}'",
            f"a token of this tokenizer as tokenizer.{key}",
            f"It has {', '.join(has)}." if has else f"Set tokenizer.{key}.",
        )
    return number


def _recorded_library(record: Path) -> LibraryName | None:
    """The library that a saved folder's record names; None where there is no record."""
    if not record.exists():
        return None
    named = read_json_object(record, "the record of this tokenizer").get("library")
    if named not in LIBRARIES:
        raise UserError(record, f"names the library {named!r}", " or ".join(LIBRARIES), FIX_RECORD)
    return named


def named_specials(path: Path) -> dict[str, str]:
    """eos_token and pad_token as the files beside a tokenizer name them; the map wins over the config."""
    named: dict[str, str] = {}
    if path.is_dir():
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if not (path / file).exists():
                continue
            for key, value in read_json_object(path / file).items():
                content = value.get("content") if isinstance(value, dict) else value
                if key in ("eos_token", "pad_token") and isinstance(content, str):
                    named[key] = content
    return named


def build_tokenizer(config: TokenizerConfig, folder: Path, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer that `config` describes, built into `folder` unless it is there already.

    Args:
        config: where the tokenizer comes from.
        folder: the run's tokenizer folder. It appears under its name only when complete; concurrent builders wait for the first.
        texts: gives the training text from its start, document by document; called by the training kinds only, more than once.

    Raises:
        UserError: the settings or the source's content differ from what `folder` was built from, or the source cannot be used.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (folder / TOKENIZER_RECORD).exists():
        # It is complete as soon as it has its name, so that reading it needs no lock and no right to write.
        return _reuse(config, folder)
    with only_process(folder.with_name(f".{folder.name}.lock"), wait=True):
        if folder.exists() and any(folder.iterdir()):
            return _reuse(config, folder)
        logger.info("building tokenizer '%s' (%s) in %s", config.name, config.kind, folder)
        tokenizer, source = _build(config, texts)
        save_new(tokenizer, folder, _settings(config), source)
    return tokenizer


def save_new(tokenizer: Tokenizer, folder: Path, settings: dict[str, Any], source: dict[str, str]) -> None:
    """Save into a folder that does not exist yet or is empty, with a record of what it was built from: all of it or nothing.

    Args:
        tokenizer: what to save.
        folder: it appears under its name only when complete and on disk.
        settings: JSON-able keys that decided the result.
        source: SHA-256 of the files it was made from, by name.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.is_symlink():
        temporary.unlink()
    elif temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    tokenizer.save(temporary)
    write_json_atomic(temporary / TOKENIZER_RECORD, tokenizer.record() | {"settings": settings, "source": source})
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_dir(temporary)
    temporary.rename(folder)
    fsync_dir(folder.parent)


def _settings(config: TokenizerConfig) -> dict[str, Any]:
    """The keys that decide the result. `path` is not among them: what lies there is compared by content."""
    keys = ["kind", "eos_token", "pad_token"]
    if config.kind.startswith("train_"):
        keys += ["vocab_size", "train_bytes"]
    if config.kind == "train_superbpe":
        keys += ["transition", "max_words_per_token", "cross_newline", "cross_colon"]
    if config.path is None:
        keys += ["hub_id"]
    return {key: getattr(config, key) for key in keys}


def _reuse(config: TokenizerConfig, folder: Path) -> Tokenizer:
    fix = "Give another run.dir, or remove this folder to build it again."
    if not (folder / TOKENIZER_RECORD).exists():
        raise UserError(
            folder, f"holds files but no {TOKENIZER_RECORD}", "a tokenizer of this project, or nothing", fix
        )
    record = read_json_object(folder / TOKENIZER_RECORD, "the record of this tokenizer", fix)
    if any(key not in record or not isinstance(record[key], kinds) for key, kinds in RECORD_TYPES.items()):
        raise UserError(folder / TOKENIZER_RECORD, "is not the record of a tokenizer built for a run", "", fix)
    asked = _settings(config)
    # A setting that came after this tokenizer was built has the value under which it was built.
    defaults = {
        key: TokenizerConfig.model_fields[key].default for key in ("cross_newline", "cross_colon") if key in asked
    }
    there = defaults | record["settings"]
    if config.path is not None:
        # Where its files came from does not matter when they are here to be compared.
        there.pop("hub_id", None)
    differing = [key for key in sorted(there.keys() | asked.keys()) if there.get(key) != asked.get(key)]
    if differing:
        changes = ", ".join(f"tokenizer.{key}={there.get(key)} there, {asked.get(key)} asked for" for key in differing)
        raise UserError(folder, f"holds a tokenizer with other settings: {changes}", "the same settings", fix)
    if config.path is not None and Path(config.path).exists():
        now = _hashes(Path(config.path))
        changed = sorted(
            name for name in now.keys() | record["source"].keys() if now.get(name) != record["source"].get(name)
        )
        if changed:
            raise UserError(
                folder,
                f"was built from other files than tokenizer.path={config.path} has now: {', '.join(changed)}",
                "",
                fix,
            )
    tokenizer = Tokenizer.load(folder, record["eos_token"], record["pad_token"])
    if tokenizer.fingerprint != record["fingerprint"]:
        raise UserError(folder, "its files do not match their fingerprint: they were changed or damaged", "", fix)
    return tokenizer


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of the files that can decide a tokenizer: name -> hex digits."""
    if path.is_file():
        return {path.name: sha256_file(path)}
    files = [path / name for name in JSON_AND_TEXT_FILES if (path / name).is_file()] + sorted(path.glob("*.model"))
    return {file.name: sha256_file(file) for file in files}


def _build(config: TokenizerConfig, texts: Callable[[], Iterator[str]]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer and the hashes of the files it was made from (none when trained)."""
    specials = [config.eos_token] + ([config.pad_token] if config.pad_token else [])
    if config.kind == "train_bpe":
        assert config.vocab_size is not None, "TokenizerConfig demands it"
        made = train_bpe(texts, config.vocab_size, specials, max_bytes=config.train_bytes)
        return Tokenizer.wrap(made, config.eos_token, config.pad_token, "train_bpe"), {}
    if config.kind == "train_superbpe":
        assert config.vocab_size is not None and config.transition is not None, "TokenizerConfig demands both"
        made = train_superbpe(
            texts,
            config.vocab_size,
            config.transition,
            specials,
            max_words=config.max_words_per_token,
            cross_newline=config.cross_newline,
            cross_colon=config.cross_colon,
            max_bytes=config.train_bytes,
        )
        return Tokenizer.wrap(made, config.eos_token, config.pad_token, "train_superbpe"), {}
    path = fetch_tokenizer(config) if config.path is None else Path(config.path)
    if config.kind == "superbpe":
        return Tokenizer.wrap(build_superbpe(path), config.eos_token, config.pad_token, path), _hashes(path)
    wanted: LibraryName = "sentencepiece" if config.kind == "sentencepiece" else "tokenizers"
    tokenizer = Tokenizer(open_library(path, wanted), config.eos_token, config.pad_token, path)
    if not tokenizer.is_lossless():
        logger.warning(
            "tokenizer %s normalizes text: decoding does not give back every text exactly, and figures per byte are"
            " relative to the original bytes",
            path,
        )
    return tokenizer, _hashes(path)


def fetch_tokenizer(config: TokenizerConfig) -> Path:
    """The folder with the files of `hub_id`, fetched or in the hub's cache already; UserError where neither can be."""
    assert config.hub_id is not None, "TokenizerConfig demands path or hub_id"
    instead = "Or download it elsewhere and set tokenizer.path to its folder."
    repo = HubRepo("tokenizer.hub_id", config.hub_id, config.hub_revision, "model", instead)
    paths = {file.path: repo.download(file) for file in repo.files([*JSON_AND_TEXT_FILES, "*.model"])}
    return next(path.parents[len(Path(name).parts) - 1] for name, path in paths.items())
