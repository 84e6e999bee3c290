"""Arguments of the command line applied to settings that are no files of `conf/`: those of a run that has begun."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from yxanul_nemo.errors import UserError


def parsed(overrides: Sequence[str]) -> list[Override] | None:
    """Return the arguments as Hydra reads them; None where it cannot, which composing says in words."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return None


def changes_list(argument: str) -> bool:
    """Return whether an argument gives a list a whole entry, as `+curriculum.phases.3={...}`, or takes one out. Hydra cannot."""
    return re.match(r"\+{0,2}[a-z_.]+\.\d+=\{|~[a-z_.]+\.\d+$", argument) is not None


def with_entries(composed: DictConfig, arguments: Sequence[str]) -> DictConfig:
    """Return a composed configuration with other entries in its lists (`changes_list`)."""
    settings: Any = OmegaConf.to_container(composed, resolve=False)
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        apply(settings, override)
    return OmegaConf.create(settings)


def apply(settings: dict[str, Any], override: Override) -> None:
    """Change one value in plain settings, as Hydra would have; a list takes one more entry at its end.

    Raises:
        UserError: the key leads into a value that has no keys, or past the end of a list.
    """
    key = override.key_or_group
    *path, last = key.split(".")
    place: Any = settings
    for part in path:
        place = _inside(place, part, key)
    if override.is_delete():
        _delete(place, last, key)
        return
    value = override.value()
    if isinstance(place, list):
        index = _index(place, last, key, most=len(place))
        if index == len(place):
            place.append(value)
            return
        place[index] = _merged(place[index], value)
    elif isinstance(place, dict):
        place[last] = _merged(place.get(last), value)
    else:
        raise UserError(key, "no such key")


def escaped(value: Any) -> Any:
    """Return settings in which OmegaConf finds no reference to other keys."""
    if isinstance(value, dict):
        return {name: escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value) if isinstance(value, str) else value


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with references to other keys, as in `run.dir='runs/lr_${optim.lr}'`, replaced by their values."""
    found = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def _inside(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, key, most=len(place) - 1)]
    if not isinstance(place, dict):
        raise UserError(key, "no such key")
    if place.get(part) is None:
        place[part] = {}
    return place[part]


def _index(place: list[Any], part: str, key: str, most: int) -> int:
    if not part.isdigit() or int(part) > most:
        parent = key[: key.index(f".{part}")]
        raise UserError(
            key, "no such key", f"{parent}.0 to {parent}.{len(place) - 1}", f"{parent}.{len(place)}={{...}} adds one."
        )
    return int(part)


def _delete(place: Any, last: str, key: str) -> None:
    if isinstance(place, list):
        del place[_index(place, last, key, most=len(place) - 1)]
    elif isinstance(place, dict) and last in place:
        del place[last]
    else:
        raise UserError(key, "no such key to take out")


def _merged(before: Any, now: Any) -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        return before | {name: _merged(before.get(name), value) for name, value in now.items()}
    return now
