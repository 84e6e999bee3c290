"""The one way in which the project tells a user that something they gave it cannot work."""

import difflib
import re
from collections.abc import Iterable

SHORTEST_PART = 3
"""Letters of a name from which on another that contains it may have been meant."""
MOST_NAMES = 6
"""Names offered at a time."""


class UserError(ValueError):
    """A mistake that the user can mend: the launcher prints it in one message, without a traceback, and exits with 2.

    Args:
        where: the key, file or command that is wrong, as the user would name it (`optim.lr`, `data/a.parquet`).
        problem: what was found there, with the value.
        expected: what would be right.
        fix: what to do about it, as a command or a key where there is one.
    """

    def __init__(self, where: object, problem: str, expected: str = "", fix: str = ""):
        self.where, self.problem, self.expected, self.fix = str(where), _readable(problem), expected, fix
        parts = [f"{self.where}: {self.problem}"]
        if expected:
            parts.append(f"expected {expected}")
        message = "; ".join(parts) + "."
        super().__init__(f"{message} {fix}".strip())

    def __reduce__(self) -> tuple[type["UserError"], tuple[object, ...]]:
        """Pickled with its parts and not with its message, so that it comes whole out of another process."""
        return UserError, (self.where, self.problem, self.expected, self.fix)


def _readable(text: str) -> str:
    """A text in which values of a thousand characters and more, as a file may have them, are cut short."""
    return re.sub(r"\S{1000,}", lambda match: f"{match[0][:100]}... ({len(match[0]):,} characters)", text)


def close_names(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names that `name` was probably meant to be, closest first: those that it is a part of, or else the one most like it."""
    names, wanted = sorted(set(valid)), name.lower()
    parts = [other for other in names if len(wanted) >= SHORTEST_PART and wanted in other.lower()]
    # `lrate` for `lr`: too far by the share of equal letters.
    begun = [other for other in names if other and wanted.startswith(other.lower())]
    by_lower = {other.lower(): other for other in names}
    close = [by_lower[other] for other in difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.6)]
    starts = [other for other in parts if other.lower().startswith(wanted)]
    return (starts or parts)[:MOST_NAMES] or close or sorted(begun, key=len, reverse=True)[:1]


def close_name(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None if none is close."""
    return next(iter(close_names(name, valid)), None)


def one_of(names: Iterable[str]) -> str:
    """The names in quotes, as alternatives in a sentence."""
    *most, last = [f"'{name}'" for name in names]
    return f"{', '.join(most)} or {last}" if most else last


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that names the valid names closest to `name`, or lists the valid ones if none is close."""
    valid = sorted(set(valid))
    close = close_names(name, valid)
    if close:
        return f"Did you mean {one_of(close)}?"
    return f"Valid: {', '.join(valid)}." if valid else ""
