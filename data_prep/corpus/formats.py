"""Formats of files with text, told by the end of a file's name."""

from enum import StrEnum


class Format(StrEnum):
    """How a file holds documents."""

    PARQUET = "parquet"
    """A row is a document."""
    JSON_LINES = "JSON lines"
    """A line is an object, and the object is a document."""
    TEXT = "text"
    """The file is a document; a long one is cut into several."""


FORMAT_OF_ENDING = {
    ".parquet": Format.PARQUET,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".json": Format.JSON_LINES,
    ".txt": Format.TEXT,
    ".md": Format.TEXT,
}
COMPRESSION_OF_ENDING = {".gz": "gzip", ".zst": "zstd"}
"""Second ending of a packed file that is not parquet -> pyarrow's name for that packing."""
ALL_ENDINGS = "*.parquet, *.jsonl, *.json, *.txt or *.md (all but parquet also as .gz or .zst)"


def format_of(name: str) -> Format | None:
    """Return the format of a file of this name; None where its ending is of no format that is read."""
    lower = name.lower()
    for ending in COMPRESSION_OF_ENDING:
        if lower.endswith(ending):
            inner = _by_ending(lower.removesuffix(ending))
            return None if inner is Format.PARQUET else inner
    return _by_ending(lower)


def compression_of(name: str) -> str | None:
    """Return pyarrow's name of the compression that a file's name tells; None for none."""
    return next((codec for ending, codec in COMPRESSION_OF_ENDING.items() if name.lower().endswith(ending)), None)


def _by_ending(name: str) -> Format | None:
    return next((kind for ending, kind in FORMAT_OF_ENDING.items() if name.endswith(ending)), None)
