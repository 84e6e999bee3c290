"""From Hydra's composed dictionary to a checked `RunConfig`, with errors that a user can act on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from yxanul_nemo.config.base import Section
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.suggest import suggest_key
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.stored import first_problem
from yxanul_nemo.unpacking.safe_config import read_plain

REPO_DIR = Path(__file__).resolve().parents[2]
CONF_DIR = REPO_DIR / "conf"
OF_ONE_COMMAND = {"from_", "prompt"}
"""Fields that say nothing of a run."""
FILE_WIDTH = 120
"""Longest line of a configuration's file, where its values allow it."""
RETIRED_KEYS = ("parallel.overlap_gradients", "plan.overlap", "plan.scale_to")
"""Keys of earlier versions that decided nothing about a model. A stored configuration may have them; they are left out."""
TEXT_KEYS = ("prompt",)
"""Keys whose values are free text, which the command line takes as it is."""


def register_schema() -> None:
    """Give Hydra the schema's defaults as the configuration `schema`, for every section that has no folder of choices in `conf/`."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items() if not field.is_required()}
    defaults = {
        name: section().model_dump(mode="json")
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Section) and not any((CONF_DIR / name).glob("*.yaml"))
    }
    ConfigStore.instance().store(name="schema", node=defaults)


register_schema()


def compose(overrides: Sequence[str] = (), config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Compose `conf/` with `key=value` overrides as the command line would.

    Args:
        overrides: arguments of the command line without Hydra's own options.
        config_dirs: folders with more options, laid out as `conf/` (the command line's `--config-dir`).

    Raises:
        UserError: a folder does not exist, or an override names no key, group or option, or cannot be parsed.
    """
    for folder in config_dirs:
        if not folder.is_dir():
            raise UserError("--config-dir", f"{folder} is not a folder", "a folder laid out as conf/")
    searched = [f"hydra.searchpath=[{','.join(repr(f'file://{folder.absolute()}') for folder in config_dirs)}]"]
    overrides = [*searched, *overrides] if config_dirs else overrides
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            return hydra.compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            # ValueError: OmegaConf's own, for a name where a list has numbers.
            raise _override_error(error, overrides, (CONF_DIR, *config_dirs)) from None


def with_quoted_text(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the values of `TEXT_KEYS` quoted for Hydra, to which commas, colons and braces mean something."""
    quoted = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key in TEXT_KEYS and equals:
            # `${` would be looked up by OmegaConf. In both grammars a backslash counts only before what it escapes.
            text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
            text = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
            argument = f"{key}='{text}'"
        quoted.append(argument)
    return quoted


def parse(composed: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration against the schema.

    Raises:
        UserError: names the first wrong key, its value, what is expected and the nearest valid key.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else dict(composed)
        return RunConfig.model_validate(plain)
    except OmegaConfBaseException as error:
        raise UserError(getattr(error, "full_key", None) or "configuration", _first_line(error)) from None
    except ValidationError as error:
        raise _schema_error(error, plain) from None


def load_run_config(path: Path) -> RunConfig:
    """Read the resolved `config.yaml` that the launcher keeps in a run's folder, which somebody else may have made.

    `${...}` in it stays as it stands: the values of this process's environment are none of the file's business.

    Raises:
        UserError: it is absent, no plain YAML, or `parse` refuses it.
    """
    if not path.is_file():
        raise UserError(
            path, "not found", "the config.yaml of a run", "Give the folder of a run that the launcher made."
        )
    try:
        loaded = read_plain(path)
        for section, _, key in (retired.partition(".") for retired in RETIRED_KEYS):
            if isinstance(loaded.get(section), dict):
                loaded[section].pop(key, None)
        return parse(loaded)
    except UserError as error:
        if error.where == str(path):
            raise
        raise UserError(f"{path} ({error.where})", error.problem, error.expected, error.fix) from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_run_config` reads back to an equal one."""
    plain = config.model_dump(mode="json", exclude=OF_ONE_COMMAND)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=FILE_WIDTH)


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a section and of the sections in it."""
    for name, field in section.model_fields.items():
        yield prefix + (field.alias or name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys_of(inner, f"{prefix}{name}.")


def _schema_error(error: ValidationError, values: Mapping[str, Any]) -> UserError:
    first = first_problem(error)
    where = first.place or "configuration"
    more = f" ({error.error_count() - 1} more of the kind)" if error.error_count() > 1 else ""
    if first.kind == "extra_forbidden":
        return UserError(where, f"no such key{more}", fix=suggest_key(where, values))
    if first.kind == "missing":
        return UserError(where, f"is not set{more}", "a value", "Give it in the recipe or as key=value.")
    if first.kind == "value_error":
        return UserError(where, first.message + more)
    message = first.message[0].lower() + first.message[1:]
    return UserError(where, f"got {first.value!r}{more}", message.removeprefix("input should be "))


def _override_error(error: Exception, overrides: Sequence[str], folders: Sequence[Path]) -> UserError:
    """Hydra's messages name the key in prose only, so it is read from there (hydra-core 1.3).

    Args:
        folders: with options, `conf/` first.
    """
    text = str(error)
    found = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if found:
        group, option = found.groups()
        options = [path.stem for folder in folders for path in (folder / group).glob("*.yaml")]
        return UserError(group, f"no option '{option}'", f"a file of conf/{group}", nearest(option, options))
    groups = [path.name for path in CONF_DIR.iterdir() if path.is_dir()]
    named = re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text)
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides if "=" in override]
    values = _chosen_groups(overrides, ["hydra.searchpath", *groups])
    if named and named.group(1) in keys_of(RunConfig):
        return _unreachable_key(named.group(1), getattr(error.__cause__, "full_key", named.group(1)))
    for key in [named.group(1)] if named else keys:
        hint = suggest_key(key, values, groups)
        if hint or named:
            return UserError(
                key, "no such key", fix=hint or "A key that no file of conf/ has is added with +key=value."
            )
    return UserError(
        "command line", _first_line(error), "key=value, as in `python launcher.py recipe=demo stage=train`"
    )


def _chosen_groups(overrides: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    """What the command line's choices of files alone compose to; empty where they do not."""
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    try:
        return OmegaConf.to_container(hydra.compose("config", overrides=choices), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return {}


def _unreachable_key(key: str, missing: str) -> UserError:
    """A key of the schema that the chosen files of conf/ lack: `missing` is what Hydra looked for, the key itself or an entry in it."""
    if missing != key:
        return UserError(
            key, f"has no entry '{missing.removeprefix(key + '.')}' to change", f"+{key}=... for a new one"
        )
    group, _, rest = key.partition(".")
    first = rest.partition(".")[0]
    options = [
        f"{group}={path.stem}"
        for path in sorted((CONF_DIR / group).glob("*.yaml"))
        if first in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    return UserError(key, f"is no key of the chosen {group}", " or ".join(options))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
