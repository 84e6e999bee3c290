"""`docs/config.md` from the schema and the files of `conf/`: `python -m yxanul_nemo.config.reference` writes it."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from yxanul_nemo.config.conf_files import CONF_DIR, REPO_DIR, first_comment, recipes
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.files import write_text_atomic

PATH = REPO_DIR / "docs" / "config.md"
HEAD = """# Configuration reference

Written by `uv run python -m yxanul_nemo.config.reference` from the schema in `yxanul_nemo/config/`; do not edit it.

A recipe (`recipe=NAME`) chooses one file from each folder of `conf/` and changes what it must. On the command line, `group=option`
chooses another file and `key=value` changes one key; later ones win. `+key=value` adds what no file has, such as another source;
`~key` takes something out. `--cfg job` shows the result. Text and paths are taken as the shell hands them over, commas, `=`, brackets
and blanks included; `~` begins a home folder, and a path may refer to another key (`'runs/lr_${optim.lr}'`). In a list, as in
`runs=[A,B]`, a part with a comma is quoted. Numbers may be written as `10M`, `1B`, `100K`, `1e9` or `1_000_000`, and a key with a
unit of time in its name takes `90s`, `30m`, `2h` or `1d`. Lists count from 0: `curriculum.phases.0.seq_len=16` is the first phase.
The default is the schema's; a file of `conf/` may say something else, and where there is "-" it has to. Sections without a table of
options have no folder in `conf/`.
"""


def reference() -> str:
    """The page's text."""
    parts = [HEAD, _recipes(), "## Top level\n", _table(_leaves(RunConfig))]
    for name, field in RunConfig.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            continue
        parts.append(f"## {name}\n\n{_flow(section.__doc__ or '')}\n")
        if len(list((CONF_DIR / name).glob("*.yaml"))) > 1:
            parts.append(_options(name))
        parts.append(_table(_leaves(section, f"{name}.")))
    return "\n".join(parts)


def _recipes() -> str:
    rows = [f"| `{name}` | {_cell(text)} |" for name, text in recipes().items()]
    return "\n".join(["## recipe\n", "| option | what it is |", "|---|---|", *rows, ""])


def _options(group: str) -> str:
    rows = [
        f"| `{group}={path.stem}` | {_cell(first_comment(path))} |"
        for path in sorted((CONF_DIR / group).glob("*.yaml"))
    ]
    return "\n".join(["| option | what it is |", "|---|---|", *rows, ""])


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Keys of a section and of what lies in its maps and lists; at the top without the sections, which have their own tables."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            if section is not RunConfig:
                yield from _leaves(inner, f"{prefix}{name}.")
            continue
        yield prefix + (field.alias or name), field
        for one in (field.annotation, *get_args(field.annotation)):
            arguments = get_args(one)
            if arguments and isinstance(arguments[-1], type) and issubclass(arguments[-1], BaseModel):
                place = "N" if get_origin(one) is list else "NAME"
                yield from _leaves(arguments[-1], f"{prefix}{name}.{place}.")
            elif one is not field.annotation and (optional := _section(one)) is not None:
                yield from _leaves(optional, f"{prefix}{name}.")


def _table(leaves: Iterator[tuple[str, FieldInfo]]) -> str:
    rows = []
    for key, field in leaves:
        cells = (_type(field.annotation) + _bounds(field), _default(field), _flow(field.description or ""))
        rows.append(f"| `{key}` | {' | '.join(map(_cell, cells))} |")
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is types.UnionType or str(origin) == "typing.Union":
        return " or ".join(_type(one) for one in arguments)
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"map from name to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "the keys below"
    if annotation is type(None):
        return "null"
    return {"str": "text", "bool": "true or false", "int": "integer", "float": "number", "Path": "path"}[
        annotation.__name__
    ]


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    words = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f", {', '.join(words)}" if words else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "-"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Path):
        return f"`{value}`"
    shown = f"{value:g}" if isinstance(value, float) else yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"`{shown.removesuffix('...\n').strip()}`"


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _flow(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    write_text_atomic(PATH, reference())
    print(f"written: {PATH}")
