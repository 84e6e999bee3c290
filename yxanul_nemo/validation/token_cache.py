"""Documents of validation domains in tokens, kept in the run's folder: text is tokenized once, not at each validation."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yxanul_nemo.files import atomic_file, fingerprint
from yxanul_nemo.log import logger
from yxanul_nemo.validation.scoring import Document

FORMAT = 1


class TokenCache:
    """A folder of files, each named by the fingerprint of what its documents follow from. Any of them may be deleted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def documents(self, made_from: dict[str, Any], make: Callable[[], Sequence[Document]]) -> list[Document]:
        """What `make` gives, from the file where there is one that can be read.

        Args:
            made_from: JSON-able; all that decides the documents.
        """
        path = self.folder / f"{fingerprint({'format': FORMAT, **made_from})[:32]}.npz"
        if (kept := _read(path)) is not None:
            return kept
        documents = list(make())
        try:
            with atomic_file(path) as handle:
                np.savez(
                    handle,
                    ids=np.concatenate([np.empty(0, np.int32), *(d.ids for d in documents)]).astype(np.int32),
                    tokens=np.array([len(d.ids) for d in documents], dtype=np.int64),
                    text_bytes=np.array([d.text_bytes for d in documents], dtype=np.int64),
                )
        except OSError as error:
            logger.warning("tokens of validation documents are not kept in %s: %s", path, error)
        return documents


def _read(path: Path) -> list[Document] | None:
    """The documents, or None where the file is absent or damaged (each part has a CRC)."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            ids, tokens, text_bytes = kept["ids"].astype(np.int64), kept["tokens"], kept["text_bytes"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        logger.warning("%s cannot be read (%s) and is made again", path, error)
        return None
    ends = np.cumsum(tokens)
    return [
        Document(ids[end - count : end], int(size)) for end, count, size in zip(ends, tokens, text_bytes, strict=True)
    ]
