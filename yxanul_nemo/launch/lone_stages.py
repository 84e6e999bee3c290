"""Stages that run alone. They leave what was trained as it is, and but for `import` and `branch`, which begin a run, take no lock."""

import os

from data_prep.corpus.manifest import load_manifest
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.help import help_text
from yxanul_nemo.log import configure_logging, logger, quiet_libraries
from yxanul_nemo.machine.surroundings import make_bearable, without_place
from yxanul_nemo.run_folder import MODEL_SOURCES

LONE_STAGES = (
    "plan", "check", "bench", "status", "cancel", "inspect_data", "compare_tokenizers", "report", "generate", "evaluate", "publish",
    "import", "branch", "help",
)  # fmt: skip
WITH_SOURCES = ("generate", "evaluate", "import", "validate", "branch")
"""Stages that `from` says something to."""


def lone_stage(config: RunConfig) -> str | None:
    """The stage of `LONE_STAGES` that is asked for, or `validate` where it is of other models than the run's; else None.

    Raises:
        UserError: `from` is given to a stage that has no use for it.
    """
    stage = config.stage
    name = stage if isinstance(stage, str) else stage[0] if len(stage) == 1 else None
    if config.sources and name not in WITH_SOURCES:
        raise UserError("from", f"is given with stage={stage}", f"stage={', '.join(WITH_SOURCES)}")
    if config.prompt and name != "generate":
        raise UserError("prompt", f"is given with stage={stage}", "stage=generate")
    return name if name in LONE_STAGES or (name == "validate" and config.sources) else None


def run_lone_stage(config: RunConfig, name: str) -> bool:
    """Run one of `LONE_STAGES`; False if it finds that the recipe, or a case of the benchmark, cannot run on this machine."""
    if name == "help":
        print(help_text())
        return True
    if name == "plan":
        from yxanul_nemo.plan.needs import require_all
        from yxanul_nemo.plan.stage import run_plan_stage

        run_plan_stage(config)
        require_all(config)
        return True
    _require_paths(config, name)
    configure_logging()
    for note in make_bearable(os.environ):
        logger.warning("%s", note)
    if name != "bench":
        # Only the benchmark is run under torchrun; elsewhere this process would wait for ranks that nobody starts.
        kept = without_place(os.environ)
        for variable in set(os.environ) - set(kept):
            del os.environ[variable]
    if name == "branch":
        from yxanul_nemo.launch.branch import run_branch_stage

        run_branch_stage(config)
        return True
    if name in WITH_SOURCES:
        quiet_libraries()
        _use_models(config, name)
        return True
    if name == "report":
        from yxanul_nemo.report.stage import run_report_stage

        run_report_stage(config)
        return True
    if name == "publish":
        quiet_libraries()
        from yxanul_nemo.publish.stage import run_publish_stage

        run_publish_stage(config)
        return True
    if name == "status":
        from yxanul_nemo.launch.status import show_runs, show_status

        if config.runs:
            show_runs(config.run_folders)
        else:
            show_status(config)
        return True
    if name == "cancel":
        from yxanul_nemo.launch.cancel import cancel_run

        cancel_run(config)
        return True
    if name in ("check", "bench"):
        quiet_libraries()
        from yxanul_nemo.machine.runtime import leave_process_groups

        if name == "bench":
            from yxanul_nemo.bench.stage import run_bench_stage as run
        else:
            from yxanul_nemo.launch.check import check_machine as run
        done = run(config)
        leave_process_groups()
        return done
    if name == "inspect_data":
        from data_prep.inspect_data import inspect

        inspect(config)
        return True
    from data_prep.compare_tokenizers import run_compare_stage

    run_compare_stage(config)
    return True


def _require_paths(config: RunConfig, name: str) -> None:
    """Refuse paths that do not exist, before what takes long to import."""
    # `branch` names a checkpoint as RUN@TOKENS.
    for source in config.sources if name != "branch" else []:
        if not source.exists():
            raise UserError("from", f"{source} does not exist", MODEL_SOURCES)
    for run in config.run_folders:
        if not run.is_dir():
            raise UserError("runs", f"{run} does not exist", "folders of runs")
    needs_corpus = any(domain.source is not None for domain in config.validation.domains.values())
    if name == "import" or (name == "validate" and needs_corpus):
        load_manifest(config.data_dir)


def _use_models(config: RunConfig, name: str) -> None:
    if name == "generate":
        from yxanul_nemo.export.generate import run_generate_stage

        run_generate_stage(config)
    elif name == "evaluate":
        from yxanul_nemo.evaluation.stage import run_evaluate_stage

        run_evaluate_stage(config)
    elif name == "import":
        from yxanul_nemo.export.import_model import run_import_stage

        run_import_stage(config)
    else:
        from yxanul_nemo.evaluation.sources import validate_sources

        validate_sources(config)
