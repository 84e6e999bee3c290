"""A process that does one task of a run: `python -m yxanul_nemo.launch.worker RUN_DIR TASK [--phase N] [--standby]`.

The launcher starts the next worker with --standby while the present one is still at work: it imports what it needs, touches
neither GPU nor files, and begins when a line arrives on its standard input; if that closes instead, it ends.
"""

import argparse
import logging
import sys
import traceback
import warnings
from pathlib import Path

from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import configure_logging

NOISY_LOGGERS = (
    "megatron",
    "nemo",
    "nemo_logger",
    "torch.utils.cpp_extension",
    "lightning",
    "lightning.pytorch",
    "torch.distributed",
)


def main() -> int:
    """Exit code: 0 done or stopped on request, 2 the user's mistake, 1 our own failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("task", choices=["train", "validate", "export"])
    parser.add_argument("--phase", type=int, default=0)
    parser.add_argument("--standby", action="store_true")
    arguments = parser.parse_args()
    configure_logging()
    quiet_libraries()
    prepare(arguments.task)
    quiet_libraries()
    if arguments.standby and not sys.stdin.readline():
        return 0
    try:
        run(load_run_config(arguments.run_dir / "config.yaml"), arguments.task, arguments.phase)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001 - the last frame: everything else is our failure and ends with its traceback
        traceback.print_exc()
        return 1
    return 0


def prepare(task: str) -> None:
    """Import what the task needs; this is most of the time that a short task takes."""
    import yxanul_nemo.training.session

    if task == "export":
        import yxanul_nemo.export.export

    del yxanul_nemo


def run(config: RunConfig, task: str, phase: int) -> None:
    """Do the task."""
    if task == "train":
        from yxanul_nemo.training.session import PhaseSession
        from yxanul_nemo.training.signals import StopRequest

        stop = StopRequest()
        stop.install()
        PhaseSession(config, phase).run(stop)
    elif task == "validate":
        from yxanul_nemo.validation.stage import validate_checkpoint

        validate_checkpoint(config)
    else:
        from yxanul_nemo.export.export import export_checkpoint

        export_checkpoint(config)


def quiet_libraries() -> None:
    """Libraries warn at import about optional parts that are absent by choice; the log is for the run."""
    warnings.filterwarnings("ignore")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
