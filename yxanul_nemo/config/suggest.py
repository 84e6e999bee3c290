"""The valid key that a wrong one was probably meant to be, at any depth: through sections, names of sources and numbers of phases."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from yxanul_nemo.config.base import alternatives
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import close_name, one_of

MANY = 12
"""Valid names beyond which a list of them helps nobody."""
WORDS_OF_OTHERS = {
    "batch_size": "Steps are measured in tokens: curriculum.phases.N.tokens_per_step; parallel.micro_batch_tokens is what a GPU holds.",
    "learning_rate": "Did you mean 'optim.lr'?",
    "max_steps": "Steps are measured in tokens: curriculum.total_tokens.",
    "epochs": "Training is measured in tokens: curriculum.total_tokens; data.max_epochs is how often a source may be read.",
    "resume": "Repeat the command with the same run.dir: it goes on from the newest checkpoint.",
    "gpus": "parallel.processes_per_node, or cluster.gpus_per_node on Slurm; plan.gpus for stage=plan.",
}
"""What other tools call things that have another name, or none, here."""


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a section and of the sections in it; `N` stands for a number in a list, `NAME` for a name in a map."""
    for name, field in section.model_fields.items():
        yield prefix + (field.alias or name)
        for inner in alternatives(field.annotation):
            if _is_section(inner):
                yield from keys_of(inner, f"{prefix}{name}.")
            elif get_origin(inner) in (dict, list) and _is_section(get_args(inner)[-1]):
                place = "N" if get_origin(inner) is list else "NAME"
                yield from keys_of(get_args(inner)[-1], f"{prefix}{name}.{place}.")


def suggest_argument(argument: str, options: Mapping[str, Sequence[str]]) -> str:
    """What an argument without `=` was probably meant to be; empty where it is like nothing.

    Args:
        options: group of `conf/` -> its options.
    """
    name = argument.lstrip("-")
    keys = [group for group, names in options.items() if name in names]
    if keys:
        return f"Did you mean {keys[0]}={name}?"
    return f"Did you mean stage={name}?" if name.isidentifier() and name != "stage" else ""


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
        if not found and part == key and key not in valid and (deeper := _elsewhere(key)):
            return deeper
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


def _elsewhere(key: str) -> str:
    """A sentence with the keys of this name deeper in the configuration; empty where there is none."""
    if key in WORDS_OF_OTHERS:
        return WORDS_OF_OTHERS[key]
    leaves = [other for other in keys_of(RunConfig) if other.endswith(f".{key}")]
    return f"Did you mean {one_of(leaves[:MANY])}?" if leaves else ""


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
