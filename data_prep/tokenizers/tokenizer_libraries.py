"""The two libraries that can stand behind `data_prep.tokenizers.tokenizer.Tokenizer`, each behind the same few methods."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers.processors import TemplateProcessing

from data_prep.tokenizers.long_text import SPAN_CHARS, LongTextEncoder
from data_prep.tokenizers.sentencepiece_json import check_sentencepiece, convert_sentencepiece
from data_prep.tokenizers.superword_encoder import SuperwordEncoder
from data_prep.tokenizers.tokenizer_checks import check_tokenizer_json
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import read_bounded
from yxanul_nemo.json_files import MAX_TOKENIZER_BYTES, parse_json
from yxanul_nemo.log import logger

MODEL_FILE = "tokenizer.model"
"""Name of a sentencepiece model in a saved folder."""


COPY_AGAIN = "Make or copy it again."
BULK_CHARS = 8_000_000
"""Text after which the second or two of preparation for faster encoding pay."""

PROBES = (
    "  two leading spaces, two  inside, one trailing ",
    "\ttabs\r\nand\n\n\nlines\n",
    "Caf\u00e9 cafe\u0301 \ufb01 \u00bd \u2460 \uff21 \u00a0 \u200b \u3000",
    "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f4bb \U0010ffff \x00\x7f",
    "<|endoftext|> </s> <s> <pad> [MASK] 1234567890 don't",
)
"""Text that a normalizing tokenizer changes in one way or another."""


LibraryName = Literal["tokenizers", "sentencepiece"]


class Library(Protocol):
    """What `Tokenizer` needs from a library. Ids are int32 arrays of shape [tokens]."""

    name: LibraryName
    vocab_size: int

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]: ...

    def bulk_encoder(self) -> SuperwordEncoder | None: ...

    def use_bulk_encoder(self, encoder: SuperwordEncoder | None) -> None: ...

    def decode(self, ids: list[int]) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def rules(self) -> Any:
        """Everything that decides ids and text, as a JSON-able value that no formatting changes."""

    def write(self, folder: Path, first_token: str | None = None) -> None:
        """Write the library's own files into an existing folder.

        Args:
            first_token: special token that transformers and others who read `tokenizer.json` put before each text; None: no token.
        """


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Turn what a library says to a file into a `UserError`; a panic of Rust, which is no `Exception`, too."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first_line = str(error).strip().partition("\n")[0][:200]
        raise UserError(path, f"not a tokenizer that can be read ({first_line})", "", COPY_AGAIN) from None


class TokenizersLibrary:
    """A tokenizer of Hugging Face's `tokenizers`."""

    name: LibraryName = "tokenizers"

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: object):
        """Take over `tokenizer`: no truncation, no padding, no special tokens added, and none recognised in text."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Templates that add BOS or EOS are dropped: documents are ended by the writer of the data, once.
        tokenizer.post_processor = None
        tokenizer.encode_special_tokens = True
        if getattr(tokenizer.model, "dropout", None):
            raise UserError(
                source,
                f"its BPE has dropout={tokenizer.model.dropout}, so that ids are random",
                "a deterministic tokenizer",
            )
        self._tokenizer = tokenizer
        self._encoded_chars = 0
        self._bulk_encoder: SuperwordEncoder | None = None
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def load(cls, path: Path) -> "TokenizersLibrary":
        """Read a tokenizer.json; UserError if it cannot be read."""
        raw = read_bounded(path, MAX_TOKENIZER_BYTES, "a tokenizer.json")
        try:
            described = parse_json(raw.decode())
        except ValueError as error:
            raise UserError(path, f"not a tokenizer.json that can be read ({error})", "", COPY_AGAIN) from None
        check_tokenizer_json(described, path)
        with _library_errors(path):
            # The bytes that were checked, and not the file, which may be another by now.
            tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            made = cls(tokenizer, path)
            for text in PROBES:
                # One by one: a batch would start the library's threads, after which this process must not fork.
                tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
        return made

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._encoded_chars <= BULK_CHARS:
            self._encoded_chars += sum(map(len, texts))
            if self._encoded_chars > BULK_CHARS:
                self.bulk_encoder()
        long = {place for place, text in enumerate(texts) if len(text) > 2 * SPAN_CHARS}
        if not long or self._long_texts is None:
            return self._encode_whole(texts)
        others = iter(self._encode_whole([text for place, text in enumerate(texts) if place not in long]))
        return [
            self._long_texts.encode(text, lambda span: self._encode_whole([span])[0]) if place in long else next(others)
            for place, text in enumerate(texts)
        ]

    @cached_property
    def _long_texts(self) -> LongTextEncoder | None:
        return LongTextEncoder.for_tokenizer(self._tokenizer)

    def bulk_encoder(self) -> SuperwordEncoder | None:
        """The faster way to the same ids, which is used from now on; None if there is none for this tokenizer."""
        if self._bulk_encoder is None:
            self.use_bulk_encoder(SuperwordEncoder.for_tokenizer(self._tokenizer))
        return self._bulk_encoder

    def use_bulk_encoder(self, encoder: SuperwordEncoder | None) -> None:
        """Take over what `bulk_encoder` gave for the same tokenizer, in another process perhaps."""
        self._bulk_encoder = encoder
        self._encoded_chars = BULK_CHARS + 1

    def _encode_whole(self, texts: list[str]) -> list[np.ndarray]:
        bulk = self._bulk_encoder.encode_batch(texts) if self._bulk_encoder is not None else [None] * len(texts)
        found = {place: ids for place, ids in enumerate(bulk) if ids is not None}
        others = [place for place in range(len(texts)) if place not in found]
        encodings = self._tokenizer.encode_batch_fast([texts[place] for place in others], add_special_tokens=False)
        for place, encoding in zip(others, encodings, strict=True):
            found[place] = np.array(encoding.ids, dtype=np.int32)
        return [found[place] for place in range(len(texts))]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def rules(self) -> Any:
        described = json.loads(self._tokenizer.to_str())
        parts = {
            part: described.get(part) for part in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
        }
        # Absent, null and false mean the same here; leaving them out keeps the value when a library adds such a field.
        return _without_empty(parts)

    def write(self, folder: Path, first_token: str | None = None) -> None:
        if first_token is not None:
            token_id = self._tokenizer.token_to_id(first_token)
            assert token_id is not None, f"{first_token} is a token of this vocabulary"
            self._tokenizer.post_processor = _template(first_token, token_id)
        try:
            self._tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        finally:
            self._tokenizer.post_processor = None


def _template(token: str, token_id: int) -> TemplateProcessing:
    """The rule that puts `token` before each text, and between the two texts of a pair."""
    # Under a name of its own, because the rule's notation gives a meaning to colons and dollars in a token.
    named = {"id": "first", "ids": [token_id], "tokens": [token]}
    return TemplateProcessing(single="first $A", pair="first $A first $B", special_tokens=[named])


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None and item is not False}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


class SentencePieceLibrary:
    """A sentencepiece model."""

    name: LibraryName = "sentencepiece"

    def __init__(self, path: Path):
        """Read a .model file; UserError if it cannot be read."""
        self._source = path
        self._processor = sentencepiece.SentencePieceProcessor()
        raw = read_bounded(path, MAX_TOKENIZER_BYTES, "a sentencepiece .model file")
        check_sentencepiece(raw, path)
        with _library_errors(path):
            self._processor.LoadFromSerializedProto(raw)
        self.vocab_size = self._processor.vocab_size()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int32) for ids in self._processor.encode(texts, out_type=int)]

    def bulk_encoder(self) -> None:
        return None

    def use_bulk_encoder(self, encoder: SuperwordEncoder | None) -> None:
        assert encoder is None, "there is no faster way for sentencepiece"

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def token_to_id(self, token: str) -> int | None:
        number = self._processor.piece_to_id(token)
        return number if self._processor.id_to_piece(number) == token else None

    def rules(self) -> Any:
        return {"sentencepiece": self._processor.serialized_model_proto().hex()}

    def write(self, folder: Path, first_token: str | None = None) -> None:
        serialized = self._processor.serialized_model_proto()
        (folder / MODEL_FILE).write_bytes(serialized)
        converted = TokenizersLibrary(convert_sentencepiece(serialized, self._source), self._source)
        different = [
            text
            for text, ours, theirs in zip(
                PROBES, self.encode_batch(list(PROBES)), converted.encode_batch(list(PROBES)), strict=True
            )
            if not np.array_equal(ours, theirs)
        ]
        if different:
            logger.warning("transformers gives other ids than sentencepiece for some text, such as %r", different[0])
        converted.write(folder, first_token)


LIBRARIES = (TokenizersLibrary.name, SentencePieceLibrary.name)
"""Names of what a tokenizer may be made with."""


def open_library(path: Path, wanted: LibraryName | None = None) -> Library:
    """The tokenizer in a folder (tokenizer.json, or one .model file) or in a .model or .json file.

    Args:
        path: the folder or file.
        wanted: "tokenizers" or "sentencepiece" if it must be that one; None: tokenizer.json where there is one.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    if not path.exists():
        raise UserError(path, "no such file or folder", "a folder with tokenizer.json, or a sentencepiece .model file")
    candidates = [path] if path.is_file() else [path / "tokenizer.json", *sorted(path.glob("*.model"))]
    by_library: dict[LibraryName, list[Path]] = {
        TokenizersLibrary.name: [file for file in candidates if file.suffix == ".json" and file.exists()],
        SentencePieceLibrary.name: [file for file in candidates if file.suffix == ".model"],
    }
    found = by_library[wanted] if wanted else by_library["tokenizers"] or by_library["sentencepiece"]
    if len(found) != 1:
        kinds = {
            "tokenizers": "tokenizer.json",
            "sentencepiece": "one .model file",
            None: "tokenizer.json or one .model file",
        }
        expected = kinds[wanted]
        raise UserError(
            path, f"holds {len(found) or 'no'} tokenizers of the kind wanted", expected, _advice(path, by_library)
        )
    return TokenizersLibrary.load(found[0]) if found[0].suffix == ".json" else SentencePieceLibrary(found[0])


def _advice(path: Path, by_library: dict[LibraryName, list[Path]]) -> str:
    if len(by_library["sentencepiece"]) > 1:
        return "Give the .model file itself as the path."
    if by_library["sentencepiece"]:
        return "It holds a sentencepiece model: set tokenizer.kind=sentencepiece."
    if by_library["tokenizers"]:
        return "It holds a tokenizer.json: set tokenizer.kind=huggingface."
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return "It holds vocab.json and merges.txt: for a SuperBPE vocabulary set tokenizer.kind=superbpe."
    return ""
