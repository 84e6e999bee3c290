"""Opening safetensors files that somebody else may have made."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

MAX_HEADER_BYTES = 8 << 20
"""Largest header: 20,000 tensors with long names. The library itself takes 100 MB, which fill gigabytes once they are objects."""


def open_safetensors(path: Path) -> Any:
    """Return `safe_open` of a file on the CPU for torch; `safetensors.SafetensorError`, OSError or ValueError if it is damaged."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {header_bytes:,} bytes, {MAX_HEADER_BYTES:,} are allowed")
    return safe_open(path, framework="pt")
