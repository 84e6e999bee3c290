"""From the words of a command line to Hydra's grammar, in which commas, quotes, blanks, `=`, brackets and `~` have meanings of their own.

Values of text and path keys are taken as the shell hands them over. In a list of them, `[A,B]`, a part that holds a comma is quoted.
Numbers, choices and groups stay Hydra's.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from yxanul_nemo.config.base import alternatives, expanded, field_types
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError

OPTIONS_WITH_VALUE = {
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
}
CONFIG_DIRS = ("--config-dir", "-cd")
SWEEPS = {"-m", "--multirun"}
_VALUE = r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|([^,]*))\s*(?:,|\Z)"""
PART = re.compile(_VALUE, re.DOTALL)
"""One part of a list, in quotes or up to the next comma."""
ENTRY = re.compile(r"\s*([^:,]*?)\s*:" + _VALUE, re.DOTALL)
"""One entry of a map."""


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """The key=value arguments, without Hydra's own options."""
    values_of_options = {i + 1 for i, argument in enumerate(arguments) if argument in OPTIONS_WITH_VALUE}
    return [a for i, a in enumerate(arguments) if not a.startswith("-") and i not in values_of_options]


def config_dirs_in(arguments: Sequence[str]) -> list[Path]:
    """Folders of `--config-dir`, whose options are valid beside those of `conf/`."""
    after = [arguments[i + 1] for i, argument in enumerate(arguments[:-1]) if argument in CONFIG_DIRS]
    return [
        Path(folder) for folder in after + [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    ]


def has_hydra_options(arguments: Sequence[str]) -> bool:
    """Return whether there are options that only Hydra's own command line knows, such as `--cfg job`."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    return not set(options) <= set(CONFIG_DIRS)


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """The arguments with the values of text and path keys quoted, and new names in free maps (`cluster.environment`) allowed.

    Raises:
        UserError: an argument is not UTF-8.
    """
    sweeps = bool(SWEEPS & set(arguments))
    return [_for_hydra(argument, sweeps) for argument in arguments]


def _for_hydra(argument: str, sweeps: bool) -> str:
    key, equals, value = argument.partition("=")
    _require_utf8(key, value)
    name = key.lstrip("+")
    annotation = None if key.startswith(("-", "~")) or not equals else annotation_of(name)
    if annotation is None:
        return argument
    kinds = alternatives(annotation)
    if value.strip().lower() == "null" and type(None) in kinds:
        return argument
    if sweeps and "," in value and name != "prompt":
        # Hydra's sweep over values.
        return argument
    maps = [kind for kind in kinds if get_origin(kind) is dict]
    if maps and _is_free(get_args(maps[0])[1]):
        inside = _text_quoter(get_args(maps[0])[1])
        return f"++{name}={_map(value, inside) if inside and value.startswith('{') else value}"
    parent = annotation_of(name.rpartition(".")[0]) if "." in name else None
    if parent is not None and any(get_origin(kind) is dict for kind in alternatives(parent)) and _is_free(annotation):
        key = f"++{name}"
    quote = _text_quoter(annotation)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if lists and value.startswith("[") and value.endswith("]"):
        quote = _text_quoter(get_args(lists[0])[0])
        return f"{key}={_list(value, quote)}" if quote else argument
    if quote is None or (bool in kinds and value.lower() in ("true", "false")):
        return f"{key}={value}"
    return f"{key}={quote(value)}"


def annotation_of(key: str) -> Any | None:
    """The type of a dotted key as the schema has it; None where it has none or the key is a group of `conf/`."""
    annotation: Any = RunConfig
    for part in key.split("."):
        annotation = _inside(annotation, part)
        if annotation is None:
            return None
    return annotation


def _inside(annotation: Any, part: str) -> Any | None:
    for kind in alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return field_types(kind).get(part)
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        if get_origin(kind) is list and part.isdigit():
            return get_args(kind)[0]
    return None


def _is_free(annotation: Any) -> bool:
    """Whether a map's values are plain ones, so that its names are the user's own; sections have names that can be mistyped."""
    return not any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in alternatives(annotation))


def _text_quoter(annotation: Any) -> Callable[[str], str] | None:
    """How a value of such a key is quoted; None where it is no text. Paths may refer to other keys, as `${run.name}`."""
    kinds = alternatives(annotation)
    if Path in kinds or _has_path_text(annotation):
        return _quoted
    return _quoted_literally if str in kinds else None


def _has_path_text(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return any(getattr(mark, "func", None) is expanded for mark in annotation.__metadata__)
    return any(_has_path_text(argument) for argument in get_args(annotation) if get_origin(annotation) is not list)


def _quoted(text: str) -> str:
    """The text in Hydra's quotes; in its grammar a backslash counts only before what it escapes."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _quoted_literally(text: str) -> str:
    """The same, with `${`, which OmegaConf would look up, as plain text."""
    return _quoted(re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text))


def _list(value: str, quote: Callable[[str], str]) -> str:
    text, parts = value.strip()[1:-1], []
    while text and (part := PART.match(text)):
        parts.append(quote(_unquoted(*part.groups())))
        text = text[part.end() :]
    return f"[{','.join(parts)}]"


def _map(value: str, quote: Callable[[str], str]) -> str:
    """The map with its values quoted; as it was where it is none, for Hydra to refuse."""
    text, entries = value.strip()[1:-1], []
    while text:
        entry = ENTRY.match(text)
        if entry is None:
            return value
        name, *inside = entry.groups()
        entries.append(f"{name}:{quote(_unquoted(*inside))}")
        text = text[entry.end() :]
    return "{" + ",".join(entries) + "}"


def _unquoted(single: str | None, double: str | None, plain: str | None) -> str:
    if plain is not None:
        return plain.strip()
    return re.sub(r"\\(['\"\\])", r"\1", single or double or "")


def _require_utf8(key: str, value: str) -> None:
    for text, where in ((key, "command line"), (value, key.lstrip("+"))):
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = text.encode(errors="surrogateescape")
            raise UserError(
                where, f"got {shown!r}, which is not UTF-8", "text in UTF-8", "Set LC_ALL=C.UTF-8, or rename the file."
            ) from None
