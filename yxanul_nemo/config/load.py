"""From Hydra's composed dictionary to a checked `RunConfig`, with errors that a user can act on."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from yxanul_nemo.config.base import Section
from yxanul_nemo.config.conf_files import CONF_DIR
from yxanul_nemo.config.overriding import changes_list, with_entries
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.suggest import keys_of, suggest_argument, suggest_key
from yxanul_nemo.errors import UserError, nearest
from yxanul_nemo.stored import Problem, first_problem
from yxanul_nemo.unpacking.safe_config import read_plain

NAMES_CODE = {"callbacks": "callbacks=[...]", "notify": "notify.command=..."}
"""Fields that name code, with how a command line gives them: who writes a file must not choose what is run."""
REQUEST_ONLY_FIELDS = {"from_", "prompt", *NAMES_CODE}
"""Fields that belong to one command and are not stored with a run."""
FILE_WIDTH = 120
"""Longest line of a configuration's file, where its values allow it."""
RETIRED_KEYS = (
    "parallel.overlap_gradients", "plan.overlap", "plan.scale_to", "checkpoint.allow_mismatch",
    "evaluate.problems", "evaluate.max_new_tokens",
    "evaluate.time_limit_seconds", "evaluate.memory_limit_mib", "evaluate.harness_tasks", "evaluate.harness_folder",
)  # fmt: skip
"""Keys of earlier versions that decided nothing about a model. A stored configuration may have them; they are left out."""


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
    new_entries = [override for override in overrides if changes_list(override)]
    overrides = [override for override in overrides if override not in new_entries]
    overrides = [*searched, *overrides] if config_dirs else overrides
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            composed = hydra.compose("config", overrides=list(overrides))
            return with_entries(composed, new_entries) if new_entries else composed
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            # ValueError: OmegaConf's own, for a name where a list has numbers.
            raise _override_error(error, overrides, (CONF_DIR, *config_dirs)) from None


def parse(composed: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration against the schema.

    Raises:
        UserError: names the first wrong key, its value, what is expected and the nearest valid key.
    """
    plain: Any = composed
    try:
        if isinstance(composed, DictConfig):
            plain = OmegaConf.to_container(composed, resolve=True)
        return RunConfig.model_validate(plain)
    except OmegaConfBaseException as error:
        raise UserError(getattr(error, "full_key", None) or "configuration", _first_line(error)) from None
    except ValidationError as error:
        raise _schema_error(error, plain) from None


def load_run_config(path: Path) -> RunConfig:
    """Read the resolved `config.yaml` that the launcher keeps in a run's folder, which somebody else may have made.

    `${...}` in it stays as it stands: the values of this process's environment are none of the file's business. Nor may it name
    code: callbacks, or a command for notices.

    Raises:
        UserError: it is absent, no plain YAML, names code, or `parse` refuses it.
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
        for field, given in NAMES_CODE.items():
            named = loaded.get(field)
            named = named.get("command") if isinstance(named, dict) else named
            if named:
                raise UserError(
                    field,
                    f"names code, {named}, which is not taken from a stored configuration",
                    "none",
                    f"Take the key out of the file, and give {given} on the command line or in a recipe.",
                )
        return parse(loaded)
    except UserError as error:
        if error.where == str(path):
            raise
        raise UserError(f"{path} ({error.where})", error.problem, error.expected, error.fix) from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_run_config` reads back to an equal one."""
    plain = config.model_dump(mode="json", exclude=REQUEST_ONLY_FIELDS)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=FILE_WIDTH)


def _schema_error(error: ValidationError, values: Mapping[str, Any]) -> UserError:
    first = first_problem(error)
    where = _known_place(first, values) or "configuration"
    more = f" ({error.error_count() - 1} more of the kind)" if error.error_count() > 1 else ""
    if first.kind == "extra_forbidden":
        return UserError(where, f"no such key{more}", fix=suggest_key(where, values))
    if first.kind == "missing":
        return UserError(where, f"is not set{more}", "a value", "Give it in the recipe or as key=value.")
    if first.kind == "value_error":
        return UserError(where, first.message + more)
    message = first.message[0].lower() + first.message[1:]
    expected = message.removeprefix("input should be ")
    if first.kind == "literal_error":
        names = re.findall(r"'([^']*)'", expected)
        return UserError(where, f"got {first.value!r}{more}", expected, _only_hint(str(first.value), names))
    if first.kind in ("int_parsing", "float_parsing"):
        expected = f"{'a whole number' if first.kind == 'int_parsing' else 'a number'}, as in 10M, 1e9 or 1_000_000"
    return UserError(where, f"got {first.value!r}{more}", expected)


def _known_place(problem: Problem, values: Any) -> str:
    """The key that a problem is about, without what pydantic adds for the types that a value may have."""
    place: list[str] = []
    for part in problem.place.split("."):
        in_list = isinstance(values, list) and part.isdigit() and int(part) < len(values)
        if not in_list and not (isinstance(values, Mapping) and part in values):
            return ".".join([*place, part] if problem.kind in ("missing", "extra_forbidden") else place)
        place.append(part)
        values = values[int(part)] if in_list else values[part]
    return ".".join(place)


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
        return _unreachable_key(named[1], str(getattr(error.__cause__, "full_key", named[1])))
    for key in [named.group(1)] if named else keys:
        hint = suggest_key(key, values, groups)
        if hint or named:
            return UserError(
                key, "no such key", fix=hint or "A key that no file of conf/ has is added with +key=value."
            )
    if comma := re.search(r"Ambiguous value for argument '([^=']+)=(.*)'", text):
        key, value = comma.groups()
        return UserError(key, f"got '{value}', with a comma", f"one value, or a list as in '{key}=[{value}]'")
    without_value = [override for override in overrides if "=" not in override and not override.startswith("~")]
    form = "key=value, as in `python launcher.py recipe=demo stage=train`"
    if without_value:
        all_options = {group: [path.stem for path in (CONF_DIR / group).glob("*.yaml")] for group in groups}
        meant = suggest_argument(without_value[0], all_options)
        return UserError("command line", f"'{without_value[0]}' has no value", form, meant)
    wrong = getattr(error, "override", None) or _first_line(error)
    return UserError(
        "command line",
        f"cannot read '{wrong}'",
        form,
        "A value with blanks, commas, brackets or = in it that is neither text nor a path needs quotes inside the shell's.",
    )


def _only_hint(name: str, valid: Sequence[str]) -> str:
    """`nearest` without the list of valid names, which the message has already."""
    hint = nearest(name, valid)
    return "" if hint.startswith("Valid") else hint


def _chosen_groups(overrides: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    """What the command line's choices of files alone compose to; empty where they do not."""
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    try:
        values: Any = OmegaConf.to_container(hydra.compose("config", overrides=choices), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return {}
    return values


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
