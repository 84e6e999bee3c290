"""`-m`: a grid of runs, as in `-m optim.lr=1e-3,2e-3 run.seed=1,2`, each in a folder of its own; a table and a report at the end."""

import itertools
import math
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override
from rich.box import SIMPLE_HEAD
from rich.table import Table

from yxanul_nemo.config.changes import change_of
from yxanul_nemo.config.conf_files import CONF_DIR, own_conf_dirs
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.overriding import parsed
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.launch.arms import Arm, places_here, run_arms
from yxanul_nemo.launch.own_settings import own_settings
from yxanul_nemo.launch.stages import StageFailed, selected_stages
from yxanul_nemo.log import configure_logging, logger, table_console
from yxanul_nemo.report.stage import write_comparison
from yxanul_nemo.validation.record import last_mean

LONGEST_NAME = 150
"""Characters of a folder's name."""
SEED = re.compile(r"(.*\.)?seed")


@dataclass(frozen=True)
class Sweep:
    """A grid of runs."""

    folder: Path
    config: RunConfig
    """Of the first arm."""
    arms: list[Arm]
    settings: dict[str, dict[str, str]]
    """Arm -> key -> value, of what is varied."""


@dataclass(frozen=True)
class Cell:
    """Runs that differ in seeds alone."""

    settings: dict[str, str]
    bits_per_byte: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds; infinite where no run has a result."""
        return statistics.fmean(self.bits_per_byte) if self.bits_per_byte else math.inf

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of fewer than two."""
        return statistics.stdev(self.bits_per_byte) if len(self.bits_per_byte) > 1 else None


def run_sweep(overrides: Sequence[str], config_dirs: Sequence[Path]) -> None:
    """Run the grid that a command line asks for; what is done already stays.

    Raises:
        UserError: an argument is wrong, for any arm, before anything is begun.
        StageFailed: an arm has failed; the others are done.
    """
    configure_logging()
    sweep = plan_sweep(overrides, config_dirs)
    if sweep.config.cluster.scheduler == "slurm":
        from yxanul_nemo.launch.slurm.array import submit_array

        submit_array(sweep.folder, sweep.config, sweep.arms)
        return
    parallel = sweep.config.parallel
    places = places_here(parallel.cpu_threads, sweep.config.sweep.at_once, parallel.device == "cpu")
    logger.info("%d runs in %s, %d at once", len(sweep.arms), sweep.folder, min(len(places), len(sweep.arms)))
    codes = run_arms(sweep.arms, places, _tell)
    show(sweep)
    if failed := [name for name, code in codes.items() if code]:
        logs = ", ".join(str(arm.folder / "sweep.log") for arm in sweep.arms if arm.name in failed)
        raise StageFailed(f"{len(failed)} of {len(sweep.arms)} runs failed, see {logs}", exit_code=1)
    _report(sweep)


def plan_sweep(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Sweep:
    """Return the grid: every combination of the values that are separated by commas.

    Raises:
        UserError: nothing is varied, or an arm's settings are wrong.
    """
    read = parsed(overrides)
    if read is None:
        compose(overrides, config_dirs)
        raise UserError("command line", "cannot be read", "key=value")
    varied = [one for one in read if one.is_sweep_override()]
    if not varied:
        raise UserError("-m", "varies nothing", "a key with several values, as in optim.lr=1e-3,2e-3")
    kept = [text for one, text in zip(read, overrides, strict=True) if one not in varied]
    values = [[(one.key_or_group, value) for value in one.sweep_string_iterator()] for one in varied]
    grid = [dict(combination) for combination in itertools.product(*values)]
    configs = [
        parse(compose([*kept, *(f"{key}={value}" for key, value in settings.items())], config_dirs))
        for settings in grid
    ]
    given = next((one.value() for one in read if one.key_or_group == "run.dir"), None)
    folder = (
        configs[0].run.dir
        if given is not None and "${" not in str(given)
        else Path("runs") / f"{configs[0].run.name}_sweep"
    )
    dirs = [f"--config-dir={path}" for path in config_dirs if path not in own_conf_dirs()]
    common = [text for text in kept if text.partition("=")[0] not in ("run.dir", "stage")]
    shares_tokens = configs[0].data.dir is None and not any(_decides_tokens(one) for one in varied)
    if shares_tokens:
        common.append(f"data.dir={folder / 'data'}")
    arms = []
    for settings, config in zip(grid, configs, strict=True):
        name = _name(settings)
        own = config.run.dir if "${" in str(given) else folder / name
        own_arguments = [f"{key}={value}" for key, value in settings.items()]
        arms.append(Arm(name, own, (*dirs, *common, *own_arguments), tuple(selected_stages(config.stage))))
    return Sweep(folder, configs[0], arms, {arm.name: settings for arm, settings in zip(arms, grid, strict=True)})


def cells(sweep: Sweep) -> list[Cell]:
    """Return the grid's results without the seeds, the best first."""
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for arm in sweep.arms:
        settings = tuple((key, value) for key, value in sweep.settings[arm.name].items() if not SEED.fullmatch(key))
        scores = found.setdefault(settings, [])
        if (score := _score(arm)) is not None:
            scores.append(score)
    return sorted((Cell(dict(settings), scores) for settings, scores in found.items()), key=lambda cell: cell.mean)


def show(sweep: Sweep) -> None:
    """Print the table on standard output and keep it as `sweep.json`."""
    found = cells(sweep)
    keys = list(found[0].settings) or ["all"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*keys, "bits/byte", "spread of seeds", "runs", ""):
        table.add_column(name, justify="right")
    for number, cell in enumerate(found):
        table.add_row(
            *(cell.settings.get(key, "") for key in keys),
            f"{cell.mean:.4f}" if cell.bits_per_byte else "",
            f"{cell.spread:.4f}" if cell.spread is not None else "",
            str(len(cell.bits_per_byte)),
            "best" if number == 0 and cell.bits_per_byte else "",
        )
    table_console().print(table)
    rows = [asdict(cell) | {"mean": cell.mean if cell.bits_per_byte else None, "spread": cell.spread} for cell in found]
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        sweep.folder / "sweep.json", {"format": "yxanul-sweep", "cells": rows, "command": shlex.join(sys.argv)}
    )


def _report(sweep: Sweep) -> None:
    folders = [arm.folder for arm in sweep.arms if _score(arm) is not None]
    if len(folders) < 2:
        return
    found = cells(sweep)
    keys = list(found[0].settings)
    rows = [
        [
            *(cell.settings[key] for key in keys),
            f"{cell.mean:.4f}" if cell.bits_per_byte else "",
            f"{cell.spread:.4f}" if cell.spread is not None else "",
            str(len(cell.bits_per_byte)),
        ]
        for cell in found
    ]
    page = write_comparison(
        folders, sweep.folder / "report", ([*keys, "bits per byte", "spread of seeds", "runs"], rows)
    )
    logger.info("report: %s", page)


def _score(arm: Arm) -> float | None:
    config = own_settings(arm.folder)
    return last_mean(config) if config is not None else None


def _tell(arm: Arm, code: int) -> None:
    if code:
        logger.warning("%s: ended with code %d, see %s", arm.name, code, arm.folder / "sweep.log")
        return
    score = _score(arm)
    logger.info("%s: done%s", arm.name, f", {score:.4f} bits per byte" if score is not None else "")


def _name(settings: Mapping[str, str]) -> str:
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    return re.sub(r"[^\w.,=+-]", "_", name)[:LONGEST_NAME]


def _decides_tokens(one: Override) -> bool:
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    return one.key_or_group in groups & {"data", "tokenizer", "recipe"} or change_of(one.key_or_group) == "by content"
