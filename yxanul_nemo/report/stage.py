"""`stage=report`: a page about one run, or one that compares several."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.errors import UserError
from yxanul_nemo.files import write_text_atomic
from yxanul_nemo.log import logger
from yxanul_nemo.report.charts import charts
from yxanul_nemo.report.comparison import comparison_charts, comparison_page, distinct_labels
from yxanul_nemo.report.gather import read_run
from yxanul_nemo.report.samples import read_or_make_samples
from yxanul_nemo.report.single import run_page
from yxanul_nemo.report.style import Chart

PAGE_NAME = "index.html"


def run_report_stage(config: RunConfig) -> Path:
    """Write the page; returns its path. With `runs=[a,b]` it compares them, else it is about `run.dir`.

    Raises:
        UserError: a folder that holds no run, or one that cannot be written to.
    """
    if len(config.run_folders) == 1:
        raise UserError(
            "runs", f"names one run, {config.run_folders[0]}", "two or more", "A page of one run: run.dir=FOLDER."
        )
    return _compare(config) if config.run_folders else _single(config)


def _single(config: RunConfig) -> Path:
    folder = config.report.dir or config.run.folder.report
    run = read_run(config.run.dir)
    with disk_errors(folder, "writing the report"):
        folder.mkdir(parents=True, exist_ok=True)
        samples = read_or_make_samples(config.run.dir, folder, config.report)
        made = charts(run)
        return _write(folder, run_page(run, made, samples), made)


def _compare(config: RunConfig) -> Path:
    folders = config.run_folders
    labels = distinct_labels(folders)
    return write_comparison(folders, config.report.dir or folders[0].parent / ("compare_" + "_".join(labels)))


def write_comparison(
    folders: Sequence[Path], into: Path, grid: tuple[list[str], list[list[str]]] | None = None
) -> Path:
    """Write a page that compares runs; returns its path.

    Args:
        grid: header and rows of a table that comes first.

    Raises:
        UserError: a folder that holds no run, or one that cannot be written to.
    """
    runs = [read_run(path, label) for path, label in zip(folders, distinct_labels(folders), strict=True)]
    with disk_errors(into, "writing the report"):
        into.mkdir(parents=True, exist_ok=True)
        made = comparison_charts(runs)
        return _write(into, comparison_page(runs, made, grid), made)


def _write(folder: Path, page: str, made: Mapping[str, Chart]) -> Path:
    for chart in made.values():
        chart.save(folder)
    path = folder / PAGE_NAME
    write_text_atomic(path, page)
    logger.info("report: %s (%d charts, %.1f MB)", path, len(made), path.stat().st_size / 1e6)
    return path
