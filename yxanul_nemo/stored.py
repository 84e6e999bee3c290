"""Records that are written to disk and read back: their base, and one reading of pydantic's errors."""

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError


class Stored(BaseModel):
    """A frozen record. Unknown keys and values of another type are errors; the string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Problem(NamedTuple):
    """One thing that pydantic found wrong."""

    place: str
    """Dotted keys and indices that lead to it; empty for a rule over the whole record."""
    message: str
    kind: str
    """Pydantic's name of the kind of error, such as `extra_forbidden`."""
    value: Any
    """What stood there."""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


def first_problem(error: ValidationError) -> Problem:
    """The first thing wrong; a key that does not exist comes before all else, because it explains that another is missing."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"])
    return Problem(place, first["msg"].removeprefix("Value error, "), first["type"], first["input"])
