"""What every section of the configuration shares: how numbers, times and paths may be written."""

import functools
import os
import re
import types
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

NUMBER = re.compile(r"([+-]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)([kKMBGT]?)")
FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
LARGEST_EXPONENT = 300
"""A number beyond ten to this power is left as it is written: pydantic refuses it."""
DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(s|min|m|h|d)")
DURATION = re.compile(rf"(?:{DURATION_PART.pattern} *)+")
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
UNIT_SECONDS = {"_seconds": 1, "_minutes": 60, "_hours": 3600}


class Section(BaseModel):
    """A frozen piece of the configuration; unknown keys and infinite numbers are errors, the string under a field is its documentation.

    Numbers may be written as `10M`, `1B`, `100K`, `1e9` and `1_000_000`, and times in a field with a unit in its name as `90s`, `30m`,
    `2h` and `1d`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_as_written(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        hints = field_types(cls)
        return {
            name: _read_numbers(value, str(name), hints[name]) if name in hints else value
            for name, value in values.items()
        }


@functools.cache
def field_types(section: type[BaseModel]) -> dict[str, Any]:
    """Name on the command line -> type as the schema has it, of each field of a section."""
    hints = get_type_hints(section, include_extras=True)
    return {field.alias or name: hints[name] for name, field in section.model_fields.items()}


def alternatives(annotation: Any) -> list[Any]:
    """The types that a value may have: those of a union, each without what validates it."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [one for argument in get_args(annotation) for one in alternatives(argument)]
    return [annotation]


def _read_numbers(value: Any, name: str, annotation: Any) -> Any:
    """`value` with the numbers in it as numbers, where they are written as text and the field holds numbers."""
    kinds = alternatives(annotation)
    if isinstance(value, str) and str not in kinds and {int, float} & set(kinds):
        return number_written(value.strip(), name)
    if isinstance(value, list):
        inner = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
        return [_read_numbers(one, name, inner) for one in value] if inner is not None else value
    return value


def number_written(text: str, name: str = "") -> int | float | str:
    """Return the number that a text such as `10M` means, or `2h` where a field's name has a unit of time; the text if it is none."""
    unit = next((seconds for ending, seconds in UNIT_SECONDS.items() if name.endswith(ending)), None)
    if unit is not None and DURATION.fullmatch(text):
        return duration_seconds(text) / unit
    found = NUMBER.fullmatch(text)
    if not found:
        return text
    number = Decimal(found[1].replace("_", "")) * FACTORS[found[2]]
    if number.adjusted() > LARGEST_EXPONENT:
        return text
    return int(number) if number == number.to_integral_value() else float(number)


def duration_seconds(text: str) -> float:
    """Seconds of a time such as `90s`, `2h` or `1d 12h` (`DURATION`)."""
    return sum(float(number) * SECONDS[unit] for number, unit in DURATION_PART.findall(text))


def expanded(value: Any) -> Any:
    """A path with `~` as the shell would have expanded it; raises ValueError for what no path can be."""
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value)
    if not text:
        raise ValueError("is empty; expected a path ('.' is the folder where the command is run)")
    if "\0" in text:
        raise ValueError("has a zero byte inside, which no path can have")
    if not text.startswith("~"):
        return value
    try:
        return type(value)(Path(text).expanduser()) if isinstance(value, Path) else str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"got {text!r}; the home folder of that user is not known here; give the whole path") from None


PathValue = Annotated[Path, BeforeValidator(expanded)]
"""A path; `~` is the home folder."""
PathText = Annotated[str, BeforeValidator(expanded)]
"""A path or a glob, kept as text; `~` is the home folder."""
