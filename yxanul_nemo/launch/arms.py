"""Several runs side by side, each a launcher of its own with a folder of its own: one on each GPU, or several on a CPU.

An arm is the product's own command, so it goes on where it was when the whole is repeated, and saves and ends when this process is gone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yxanul_nemo.config.conf_files import REPO_DIR
from yxanul_nemo.launch.processes import end_with_parent
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpus import visible_gpus
from yxanul_nemo.shared_files import open_for_appending

INSTALLED = "from yxanul_nemo.launch.command import run_command; run_command()"
"""What the command `yxanul` does."""
POLL_SECONDS = 0.2
PREPARING = ("fetch", "data")
"""Stages that are done by one arm at a time, because arms may share what they make."""


@dataclass(frozen=True)
class Arm:
    """One run."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    """Of the command line, without `stage` and `run.dir`."""
    stages: tuple[str, ...]

    def command(self, stages: Sequence[str]) -> list[str]:
        """Return the launcher's command for some stages."""
        asked = [f"stage=[{','.join(stages)}]", f"run.dir={self.folder}"]
        in_clone = REPO_DIR / "launcher.py"
        begin = [str(in_clone)] if in_clone.is_file() else ["-c", INSTALLED]
        return [sys.executable, *begin, *self.arguments, *asked]


@dataclass
class _AtWork:
    arm: Arm
    process: subprocess.Popen[bytes]
    place: str
    prepares: bool


def places_here(cpu_threads: int, at_once: int | None, on_cpu: bool) -> list[str]:
    """Return a name for each arm that can be at work at once: a GPU's number, or nothing on a CPU.

    Args:
        cpu_threads: of one arm on a CPU; 0: two cores each.
        at_once: arms at once, where the user says so.
    """
    if not on_cpu and visible_gpus():
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = listed.split(",") if listed else [str(number) for number in range(visible_gpus())]
        return [gpus[i % len(gpus)] for i in range(at_once or len(gpus))]
    cores = len(os.sched_getaffinity(0))
    return [""] * (at_once or max(1, cores // (cpu_threads or 2)))


def run_arms(arms: Sequence[Arm], places: Sequence[str], ended: Callable[[Arm, int], None]) -> dict[str, int]:
    """Run the arms, as many at once as there are places; name -> exit code.

    Args:
        places: of `places_here`.
        ended: is told each arm and its exit code.
    """
    waiting = [arm for arm in arms if set(arm.stages) & set(PREPARING)]
    ready = [arm for arm in arms if arm not in waiting]
    free, at_work = list(places), list[_AtWork]()
    codes: dict[str, int] = {}
    try:
        while waiting or ready or at_work:
            preparing = any(one.prepares for one in at_work)
            while free and ready:
                at_work.append(_start(ready.pop(0), free.pop(0), prepares=False))
            if free and waiting and not preparing:
                at_work.append(_start(waiting.pop(0), free.pop(0), prepares=True))
            time.sleep(POLL_SECONDS)
            for one in [one for one in at_work if one.process.poll() is not None]:
                at_work.remove(one)
                free.insert(0, one.place)
                code = one.process.returncode
                if one.prepares and code == 0 and set(one.arm.stages) - set(PREPARING):
                    ready.append(one.arm)
                    continue
                codes[one.arm.name] = code
                ended(one.arm, code)
    except BaseException:
        for one in at_work:
            one.process.send_signal(signal.SIGTERM)
        for one in at_work:
            one.process.wait()
        raise
    return codes


def _start(arm: Arm, place: str, prepares: bool) -> _AtWork:
    stages = [name for name in arm.stages if (name in PREPARING) == prepares]
    arm.folder.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    environment: Mapping[str, str] = os.environ | ({"CUDA_VISIBLE_DEVICES": place} if place else {})
    with open_for_appending(arm.folder / "sweep.log") as log:
        process = subprocess.Popen(
            arm.command(stages),
            cwd=Path.cwd(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches this process, which tells its arms; a kill of it does by the kernel.
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(parent),
        )
    if not prepares:
        logger.info("%s: begun%s, log %s", arm.name, f" on GPU {place}" if place else "", arm.folder / "sweep.log")
    return _AtWork(arm, process, place, prepares)
