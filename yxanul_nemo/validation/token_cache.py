"""Documents of validation domains in tokens, kept in the run's folder: text is tokenized once, not at each validation."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from yxanul_nemo.files import atomic_file, fingerprint
from yxanul_nemo.log import logger
from yxanul_nemo.validation.scoring import Document

FORMAT = 2
PARTS = ("ids", "tokens", "text_bytes")


class TokenCache:
    """A folder of files, each named by the fingerprint of what its documents follow from. Any of them may be deleted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def documents(self, made_from: dict[str, Any], make: Callable[[], Sequence[Document]]) -> list[Document]:
        """What `make` gives, from the file where there is one that can be read.

        Args:
            made_from: JSON-able; all that decides the documents.
        """
        path = self.folder / f"{fingerprint({'format': FORMAT, **made_from})[:32]}.safetensors"
        if (kept := _read(path)) is not None:
            return kept
        documents = list(make())
        parts: dict[str, np.ndarray] = {
            "ids": np.concatenate([np.empty(0, np.int64), *(d.ids for d in documents)]).astype(np.int32),
            "tokens": np.array([len(d.ids) for d in documents], dtype=np.int64),
            "text_bytes": np.array([d.text_bytes for d in documents], dtype=np.int64),
        }
        try:
            with atomic_file(path) as handle:
                handle.write(save(parts, metadata={"crc32": _crc32(parts)}))
        except OSError as error:
            logger.warning("tokens of validation documents are not kept in %s: %s", path, error)
        return documents


def _crc32(parts: Mapping[str, np.ndarray]) -> str:
    """Of all parts: the format itself does not notice a flipped bit."""
    return str(zlib.crc32(b"".join(parts[name].tobytes() for name in PARTS)))


def _read(path: Path) -> list[Document] | None:
    """The documents, or None where the file is absent or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as kept:
            parts = {name: kept.get_tensor(name) for name in PARTS}
            if (kept.metadata() or {}).get("crc32") != _crc32(parts):
                raise SafetensorError("its content is not what was written")
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be read (%s) and is made again", path, error)
        return None
    ids, ends = parts["ids"].astype(np.int64), np.cumsum(parts["tokens"])
    return [
        Document(ids[end - count : end], int(size))
        for end, count, size in zip(ends, parts["tokens"], parts["text_bytes"], strict=True)
    ]
