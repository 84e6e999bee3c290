"""JSON that somebody else may have written: read within a bound, and refused where two readers could see two things in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yxanul_nemo.errors import UserError
from yxanul_nemo.files import read_bounded

MAX_BYTES = 16 << 20
"""Largest file. Python's objects take up to 25 bytes of memory for a byte of hostile JSON."""
MAX_TOKENIZER_BYTES = 48 << 20
"""Largest file with a vocabulary; that of 262,000 pieces with their merges has 33 MB."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError if it is none, nests too deeply, or gives one key of an object twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def read_json(path: Path, expected: str = "", fix: str = "", max_bytes: int = MAX_BYTES) -> Any:
    """Return the value in a JSON file; UserError, with `expected` and `fix`, if there is none."""
    raw = read_bounded(path, max_bytes, expected, fix)
    try:
        return parse_json(raw.decode())
    except ValueError as error:
        raise UserError(path, f"not valid JSON ({error})", expected, "Make, copy or download the file again.") from None


def read_json_object(path: Path, expected: str = "", fix: str = "", max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    value = read_json(path, expected, fix, max_bytes)
    if not isinstance(value, dict):
        raise UserError(path, f"holds a JSON {type(value).__name__}", expected or "a JSON object", fix)
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # Python takes the last of them and other readers the first, or both.
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found
