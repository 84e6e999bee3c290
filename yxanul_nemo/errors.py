"""The one way in which the project tells a user that something they gave it cannot work."""

import difflib
import re
from collections.abc import Iterable


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

    def __reduce__(self) -> tuple:
        """Pickled with its parts and not with its message, so that it comes whole out of another process."""
        return UserError, (self.where, self.problem, self.expected, self.fix)


def _readable(text: str) -> str:
    """A text in which values of a thousand characters and more, as a file may have them, are cut short."""
    return re.sub(r"\S{1000,}", lambda match: f"{match[0][:100]}... ({len(match[0]):,} characters)", text)


def close_name(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None if none is close."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    # `lrate` for `lr`: too far by the share of equal letters.
    begun = [other for other in names if name and other and (name.startswith(other) or other.startswith(name))]
    return next(iter([*close, *sorted(begun, key=len, reverse=True)]), None)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that names the valid name closest to `name`, or lists the valid ones if none is close."""
    valid = sorted(set(valid))
    close = close_name(name, valid)
    if close is not None:
        return f"Did you mean '{close}'?"
    return f"Valid: {', '.join(valid)}." if valid else ""
