"""The settings of a run that has begun: its own `config.yaml`, with what the command line says on top.

`run.dir=X` alone goes on as the run was. A command that names a recipe says all settings anew, and one that chooses another file of
`conf/` those of its section.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from yxanul_nemo.checkpoint.going_on import Difference, setting_differences
from yxanul_nemo.checkpoint.identity import settings_of
from yxanul_nemo.config.base import expanded
from yxanul_nemo.config.cluster import ClusterConfig
from yxanul_nemo.config.conf_files import CONF_DIR
from yxanul_nemo.config.load import compose, load_run_config, parse
from yxanul_nemo.config.overriding import apply, escaped, parsed, resolved
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.run_folder import RunFolder

OF_ONE_COMMAND = ("stage", "from", "prompt", "phases", "runs", "allow")
"""Keys that a command says for itself alone."""
OF_TRAINING = ("run", "model", "tokenizer", "data", "curriculum", "optim", "precision", "guards")
"""Sections that training is decided by."""
LOOKING = ("status", "report", "cancel", "generate", "evaluate", "validate", "export", "publish")
"""Stages about what was trained: settings of training that differ change nothing for them."""
COMMANDS_OF_JOBS = {
    name: getattr(ClusterConfig(), name) for name in ("setup", "environment", "sbatch", "srun", "container")
}
"""Keys of `cluster` by which a job runs something, with nothing chosen: who writes a file must not choose what is run."""
BEGINNING = ("branch", "import", "help")
"""Stages that begin a run, or are about none."""


class Asked(NamedTuple):
    """What a command line asks for."""

    config: RunConfig
    said: list[str]
    """Whose settings these are, in lines for people; empty for a run that has not begun."""


def asked_settings(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Asked:
    """Return the settings that a command line asks for.

    Args:
        overrides: arguments in Hydra's grammar, without Hydra's own options.
        config_dirs: folders with more options than `conf/` has.

    Raises:
        UserError: an argument names no key or has no valid value.
    """
    read = parsed(overrides)
    stage = _last(read or (), "stage") or "all"
    run_dir = _run_dir(read, overrides, config_dirs) if read is not None and stage not in BEGINNING else None
    if read is not None and stage == "branch":
        return _branch(read, overrides, config_dirs)
    stored = _stored_settings(run_dir) if run_dir is not None else None
    if read is None or stored is None or run_dir is None:
        return Asked(_whole(overrides, config_dirs), [])
    own = _taken_over(stored, run_dir)
    try:
        asked = _changed(own, read, overrides, config_dirs)
    except UserError:
        # The command that began the run, word by word: it took something out that is not there any more.
        asked = _whole(overrides, config_dirs)
        if _differences(own, asked):
            raise
    found = _differences(own, asked)
    said = [f"the settings are those of the run in {run_dir}"]
    named = ", ".join(map(str, found))
    if found and _is_looking(asked.stage):
        said.append(f"shown by these; the command line's differ in {named}")
        asked = asked.model_copy(update={name: getattr(own, name) for name in OF_TRAINING})
    elif found:
        said.append(f"the command line changes {named}")
    if not _is_looking(asked.stage):
        said += _left_out(stored, asked)
    kept = [name for name in own.allow if not any(_is_under(one.key, name) for one in found)]
    allow = list(dict.fromkeys([*asked.allow, *kept]))
    return Asked(asked.model_copy(update={"allow": allow}), said)


def _branch(read: Sequence[Override], overrides: Sequence[str], config_dirs: Sequence[Path]) -> Asked:
    """Return the settings of a run that begins from a checkpoint of another."""
    from yxanul_nemo.launch.branch import parent_of, parent_settings

    source, run_dir = _last(read, "from"), _run_dir(read, overrides, config_dirs)
    if source is None:
        raise UserError(
            "from", "is not set", "RUN or RUN@TOKENS", "As in stage=branch from=runs/a@100000 run.dir=runs/b."
        )
    if run_dir is None or _last(read, "run.dir") is None:
        raise UserError("run.dir", "is not set", "a new folder for the branch", "As in run.dir=runs/branch.")
    parent = parent_of(str(expanded(str(source))))
    now = own_settings(parent.run_dir)
    if now is None:
        raise UserError("from", f"is {source}, which has no config.yaml", "the folder of a run")
    base = parent_settings(parent, now)
    base = base.model_copy(update={"run": base.run.model_copy(update={"dir": run_dir})})
    asked = _changed(base, read, overrides, config_dirs)
    said = [f"the settings are those of the run in {parent.run_dir} after {parent.checkpoint.tokens:,} tokens"]
    found = _differences(base, asked)
    return Asked(asked, said + ([f"the command line changes {', '.join(map(str, found))}"] if found else []))


def _differences(before: RunConfig, now: RunConfig) -> list[Difference]:
    there, here = (settings_of(one, plan_phases(one.curriculum)) for one in (before, now))
    return setting_differences(there, here)


def _last(read: Sequence[Override], key: str) -> Any:
    """Return the value that the command line gives a key at last; None where it gives none."""
    return next((one.value() for one in reversed(read) if one.key_or_group == key), None)


def own_settings(run_dir: Path) -> RunConfig | None:
    """Return the settings that a run was last given, with the folder that it is in now; None for one that has not begun.

    What a job of Slurm would run is left out of them (`COMMANDS_OF_JOBS`).

    Raises:
        UserError: they cannot be read.
    """
    stored = _stored_settings(run_dir)
    return None if stored is None else _taken_over(stored, run_dir)


def _stored_settings(run_dir: Path) -> RunConfig | None:
    folder = RunFolder(run_dir)
    path = folder.slurm_config if folder.slurm_chain.is_file() else folder.config
    return load_run_config(path) if path.is_file() else None


def _taken_over(stored: RunConfig, run_dir: Path) -> RunConfig:
    """Return what counts of a run's file: not where the run was, nor what a job of Slurm would run."""
    run, cluster = stored.run.model_copy(update={"dir": run_dir}), stored.cluster.model_copy(update=COMMANDS_OF_JOBS)
    return stored.model_copy(update={"run": run, "cluster": cluster})


def _left_out(stored: RunConfig, asked: RunConfig) -> list[str]:
    """Return a line for each key of `COMMANDS_OF_JOBS` that the run's file has and the command line does not."""
    return [
        f"cluster.{key} is not taken from the run's file, because jobs would run it: give it on the command line if it still holds"
        for key, none in COMMANDS_OF_JOBS.items()
        if getattr(stored.cluster, key) != none == getattr(asked.cluster, key)
    ]


def _run_dir(read: Sequence[Override], overrides: Sequence[str], config_dirs: Sequence[Path]) -> Path | None:
    """Return the folder of the run that the command line is about; None where that cannot be composed."""
    groups = _groups(config_dirs)
    about_place = [
        text
        for one, text in zip(read, overrides, strict=True)
        if one.key_or_group in groups or one.key_or_group.startswith("run.")
    ]
    try:
        composed = compose(about_place, config_dirs)
        plain: Any = OmegaConf.to_container(composed, resolve=False)
        if re.search(r"\$\{(?!run\.name\})", str(plain["run"]["dir"])):
            composed = compose(overrides, config_dirs)
        return Path(expanded(str(composed.run.dir)))
    except (OmegaConfBaseException, ValueError):
        # What is wrong with it is said where the whole is composed.
        return None


def _changed(
    own: RunConfig, read: Sequence[Override], overrides: Sequence[str], config_dirs: Sequence[Path]
) -> RunConfig:
    """Return a run's own settings with the command line's on top."""
    groups = _groups(config_dirs)
    if any(one.key_or_group == "recipe" for one in read):
        return _whole(overrides, config_dirs, own)
    settings = own.model_dump(
        mode="json", by_alias=True, exclude={"from_" if name == "from" else name for name in OF_ONE_COMMAND}
    )
    keys = [one.key_or_group for one in read]
    of_phases = any(key.startswith("curriculum.phases") for key in keys) and "curriculum.total_tokens" not in keys
    if of_phases and own.curriculum.total_tokens is not None:
        _unscale(settings["curriculum"], own)
    settings = escaped(settings)
    # As Hydra does: files first, whatever the order of the arguments.
    for one in sorted(read, key=lambda one: one.key_or_group not in groups):
        if one.key_or_group in groups:
            settings[one.key_or_group] = _option(one.key_or_group, str(one.value()), config_dirs)
        elif one.key_or_group != "run.dir" and not one.key_or_group.startswith("hydra."):
            apply(settings, one)
    return parse(resolved(settings))


def _whole(overrides: Sequence[str], config_dirs: Sequence[Path], own: RunConfig | None = None) -> RunConfig:
    """Return what a command line says by itself, sized where it has a budget of hours.

    Args:
        own: settings of the run in its folder, whose sizes hold for the same hours.
    """
    asked = parse(compose(overrides, config_dirs))
    if asked.budget.hours is None:
        return asked
    if own is not None and own.budget.hours == asked.budget.hours:
        sizes, because = own.budget.sizes, own.budget.because
    else:
        from yxanul_nemo.plan.sizing import size_run

        given = [one.key_or_group for one in parsed(overrides) or [] if one.key_or_group != "recipe"]
        sizes, because = size_run(asked, given)
    sized = parse(compose([*sizes, *overrides], config_dirs))
    return sized.model_copy(update={"budget": sized.budget.model_copy(update={"sizes": sizes, "because": because})})


def _unscale(curriculum: dict[str, Any], own: RunConfig) -> None:
    """Give each phase the tokens that it is trained for, so that one can change without the others."""
    curriculum["total_tokens"] = None
    for phase, settings in zip(plan_phases(own.curriculum), curriculum["phases"], strict=True):
        settings["tokens"] = phase.tokens


def _option(group: str, name: str, config_dirs: Sequence[Path]) -> dict[str, Any]:
    """Return what a file of `conf/` says, with the files of its folder that it begins with."""
    path = next(found for folder in (*config_dirs, CONF_DIR) if (found := folder / group / f"{name}.yaml").is_file())
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    begins_with = [one for one in loaded.pop("defaults", []) if isinstance(one, str) and one != "_self_"]
    settings: dict[str, Any] = {}
    for other in begins_with:
        settings |= _option(group, other, config_dirs)
    return settings | loaded


def _groups(config_dirs: Sequence[Path]) -> set[str]:
    return {
        path.name
        for folder in (CONF_DIR, *config_dirs)
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_dir()
    }


def _is_looking(stage: str | list[str]) -> bool:
    return set([stage] if isinstance(stage, str) else stage) <= set(LOOKING)


def _is_under(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.")
