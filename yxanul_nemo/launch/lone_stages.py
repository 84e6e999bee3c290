"""Stages that run alone: most only look; none takes a lock, and all leave what was trained as it is."""

import logging
import warnings

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.launch.help import help_text
from yxanul_nemo.log import configure_logging

LONE_STAGES = (
    "plan", "check", "bench", "status", "cancel", "inspect_data", "compare_tokenizers", "report", "help"
)  # fmt: skip


def run_lone_stage(config: RunConfig, name: str) -> bool:
    """Run one of `LONE_STAGES`; False if it finds that the recipe, or a case of the benchmark, cannot run on this machine."""
    if name == "help":
        print(help_text())
        return True
    if name == "plan":
        from yxanul_nemo.launch.plan_stage import run_plan_stage

        run_plan_stage(config)
        return True
    configure_logging()
    if name == "report":
        from yxanul_nemo.report.stage import run_report_stage

        run_report_stage(config)
        return True
    if name == "status":
        from yxanul_nemo.launch.status import show_status

        show_status(config)
        return True
    if name == "cancel":
        from yxanul_nemo.launch.cancel import cancel_run

        cancel_run(config)
        return True
    if name in ("check", "bench"):
        # Libraries warn at import about optional parts that are absent by choice.
        warnings.filterwarnings("ignore")
        logging.getLogger("megatron").setLevel(logging.ERROR)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        if name == "bench":
            from yxanul_nemo.bench.stage import run_bench_stage

            return run_bench_stage(config)
        from yxanul_nemo.launch.check import check_machine

        return check_machine(config)
    if name == "inspect_data":
        from data_prep.inspect_data import inspect

        inspect(config)
        return True
    from data_prep.compare_tokenizers import run_compare_stage

    run_compare_stage(config)
    return True
