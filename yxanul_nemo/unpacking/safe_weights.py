"""Files of weights that somebody else may have made: what one by `torch.save` says, looked through before
`torch.load(weights_only=True)` reads it, and safetensors with a header of bounded size.

torch's restricted unpickler runs no code of the file's, but it makes what the file asks for: buffers of any size, tuples inside
tuples whose hash takes for ever, tensors of many kinds. Weights need two functions and the types of storage, and none of these.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

MAX_PICKLE_BYTES = 8 << 20
"""Largest description of the tensors, at some 300 bytes for each."""
MAX_HEADER_BYTES = 8 << 20
"""Largest header: 20,000 tensors with long names. The library itself takes 100 MB, which fill gigabytes once they are objects."""
NAMES = re.compile(
    r"torch [A-Za-z0-9]+Storage|torch\._utils _rebuild_tensor_v2|torch\._utils _rebuild_parameter|collections OrderedDict"
)
"""Module and name of what may be asked for."""
MEMO_WRITES = ("BINPUT", "LONG_BINPUT")
MEMO_READS = ("BINGET", "LONG_BINGET")
SHARED = ("BINUNICODE", "GLOBAL", "REDUCE")
"""What may be used a second time: text, names, and what was rebuilt. A tuple of a tuple of ..., each used twice, is exponential."""
OTHERS = frozenset({
    "PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS",
    "APPEND", "APPENDS", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINPERSID", "BUILD",
})  # fmt: skip
"""The other instructions that torch.save writes (pickle's protocol 2)."""


def pickled_problems(path: Path) -> Iterator[str]:
    """Yield what keeps a file from being one of plain tensors by torch.save, as the rest of a sentence about it.

    Raises:
        zipfile.BadZipFile, ValueError, OSError and others: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        names = [part.filename.casefold() for part in parts]
        if archive.comment or len(set(names)) < len(names):
            yield "has a comment, or two parts of one name"
        # torch.save stores without compression; a reader that unpacks could be made to fill the memory.
        if packed := [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]:
            yield f"has the compressed part {packed[0][:80]!r}"
        if sum(part.file_size for part in parts) > path.stat().st_size:
            yield "has parts that lie over one another"
        pickles = [part for part in parts if part.filename.endswith(".pkl")]
        if (
            len(pickles) != 1
            or not pickles[0].filename.endswith("/data.pkl")
            or pickles[0].file_size > MAX_PICKLE_BYTES
        ):
            yield "has no data.pkl, or more than that, or too large a one"
            return
        described = archive.read(pickles[0])
    before, memo = "", {}
    for operation, value, _ in pickletools.genops(described):
        name = operation.name
        if name in MEMO_WRITES:
            memo[value] = before
        elif name in MEMO_READS:
            if memo.get(value) not in SHARED:
                yield f"uses a {memo.get(value, 'nothing')} twice"
        elif name == "GLOBAL":
            if NAMES.fullmatch(str(value)) is None:
                yield f"names {str(value)[:80].replace(' ', '.')}"
        elif name not in OTHERS and name not in SHARED:
            yield f"has the instruction {name}"
        before = name


def open_safetensors(path: Path) -> Any:
    """Return `safe_open` of a file on the CPU for torch; `safetensors.SafetensorError`, OSError or ValueError if it is damaged."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {header_bytes:,} bytes, {MAX_HEADER_BYTES:,} are allowed")
    return safe_open(path, framework="pt")
