"""The valid key that a wrong one was probably meant to be, at any depth: through sections, names of sources and numbers of phases."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import close_name

MANY = 12
"""Valid names beyond which a list of them helps nobody."""


def suggest_key(key: str, values: Mapping[str, Any], groups: Sequence[str] = ()) -> str:
    """A sentence with the nearest valid key, or with what is valid in the place where nothing is near; empty if the key is valid.

    Args:
        key: as written on the command line, such as `data.sources.text.pth`.
        values: a composed configuration, for the names of sources and domains and the number of phases.
        groups: folders of `conf/`, which are valid at the top besides the schema's own keys.
    """
    section: Any = RunConfig
    value: Any = values
    found: list[str] = []
    for part in key.split("."):
        valid, open_names = _valid(section, value)
        valid += [group for group in groups if not found and group not in valid]
        near = None if get_origin(section) is list else close_name(part, valid)
        name = part if part in valid else near
        if name is None and open_names:
            name = part
        if name is None:
            return _nothing_near(found, valid, value)
        found.append(name)
        section, value = _inside(section, name), _value(value, name)
    meant = ".".join(found)
    return f"Did you mean '{meant}'?" if meant != key else ""


def _nothing_near(found: Sequence[str], valid: Sequence[str], value: Any) -> str:
    place = ".".join(found)
    if not valid:
        return f"'{place}' is a value of its own, without keys inside."
    if isinstance(value, Sequence):
        return f"{place} has the entries 0 to {len(value) - 1}."
    where = f"Under {place}: " if place else "Valid: "
    shown = ", ".join(valid[:MANY]) + (", ..." if len(valid) > MANY else "")
    return f"{where}{shown}. docs/config.md lists all keys." if len(valid) > MANY else f"{where}{shown}."


def _valid(section: Any, value: Any) -> tuple[list[str], bool]:
    """Names valid here, and whether new ones may be given."""
    if _is_section(section):
        return sorted(field.alias or name for name, field in section.model_fields.items()), False
    kind = get_origin(section)
    if kind is dict:
        return (sorted(map(str, value)) if isinstance(value, Mapping) else []), True
    if kind is list and _is_section(get_args(section)[0]):
        return ([str(i) for i in range(len(value))] if isinstance(value, Sequence) else []), False
    return [], False


def _inside(section: Any, name: str) -> Any:
    """What the schema says about a key's value, without `None` and other alternatives to sections, maps and lists."""
    if _is_section(section):
        field = section.model_fields.get(name)
        annotation = field.annotation if field is not None else None
    else:
        annotation = get_args(section)[-1] if get_args(section) else None
    for one in (annotation, *get_args(annotation)):
        if _is_section(one) or get_origin(one) in (dict, list):
            return one
    return None


def _value(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str) and name.isdigit() and int(name) < len(value):
        return value[int(name)]
    return None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
