"""Files that somebody else made are tried here: each is read or refused in our words, within bounds, and harms nothing.

`pytest` prints how many were tried of each kind, and what came of them (docs/faults.md).
"""

import json
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from yxanul_nemo.errors import UserError

MORE_BYTES, CPU_SECONDS = 2 << 30, 20
TRIED: dict[str, Counter[str]] = {}
"""Kind -> outcome -> number of inputs."""


def attempt(kind: str, folder: Path, read: Callable[[], object]) -> str:
    """Return the message with which `read` refuses its input, or "" if it takes it; anything else fails the test.

    Args:
        folder: nothing in it may change.
    """
    before = _state(folder)
    message = ""
    with _limits():
        try:
            read()
        except UserError as error:
            message = str(error)
            assert error.where and len(message) < 2000, "one message that a person can read"
    assert _state(folder) == before, "files were made, changed or removed"
    TRIED.setdefault(kind, Counter())["refused" if message else "read"] += 1
    return message


def _state(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Names of all files and folders; size and time of change of the files."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): None if path.is_dir() else (about.st_size, about.st_mtime_ns) for path, about in found.items()}


@contextmanager
def _limits() -> Iterator[None]:
    """2 GiB more of address space than there is now, and 20 seconds of processor time: beyond them the test fails."""

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"took more than {CPU_SECONDS} seconds of processor time")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGPROF, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


NASTY = st.sampled_from(
    [
        *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**300, 0.5, -0.0, 1e-300, 1e300, float("inf"), float("nan")),
        "",
        "x",
        "../../etc/passwd",
        "\u0000",
        "x" * 5000,
        "(a+)+$",
        "os.system",
        [],
        [0],
        [[[[]]]],
        {},
        {"type": "Sequence"},
    ]
)
"""Values that have broken readers."""


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """A JSON value with one or two of its values replaced, removed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        *above, last = draw(st.sampled_from(sorted(places(value), key=str)))
        holder = value
        for key in above:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "double"])):
            case "replace":
                holder[last] = draw(NASTY)
            case "remove":
                del holder[last]
            case "double" if isinstance(holder, list):
                holder.append(holder[last])
            case "double":
                holder[f"{last}_"] = holder[last]
    return value


@st.composite
def damaged(draw: st.DrawFn, raw: bytes, most_bytes: int | None = None) -> bytes:
    """Bytes with some changed, cut off or inserted, in their first `most_bytes`."""
    end = min(len(raw), most_bytes or len(raw))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, end - 1))
        match draw(st.sampled_from(["bytes", "bytes", "number", "cut", "insert"])):
            case "bytes":
                new = draw(st.binary(min_size=1, max_size=8))
                raw = raw[:place] + new + raw[place + len(new) :]
            case "number":
                number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
                raw = raw[:place] + number.to_bytes(8, "little") + raw[place + 8 :]
            case "cut":
                raw = raw[:place]
            case "insert":
                raw = raw[:place] + draw(st.binary(min_size=1, max_size=40)) + raw[place:]
        end = max(1, min(end, len(raw)))
        raw = raw or b"\0"
    return raw
