"""Real launcher processes for tests: started, watched through /proc, and interrupted."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL

REPO_DIR = Path(__file__).resolve().parents[2]
FAULTS_DIR = Path(__file__).parent / "faults"
PATIENCE_SECONDS = 240


def command(*arguments: object) -> list[str]:
    """The launcher with the small demo's settings."""
    return [sys.executable, "launcher.py", *SMALL, *map(str, arguments)]


def launch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end, with these variables beside the test's own; its output is in `stdout`."""
    return _run(command(*arguments), environment)


def launch_alone(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher with these arguments and no others."""
    return _run([sys.executable, "launcher.py", *map(str, arguments)], environment)


def _run(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=REPO_DIR,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


class Launched:
    """A launcher in a process group of its own, as a terminal would start it, with its output in a file.

    Args:
        stop_at: name of a file or folder; a process stops when it is about to give that name.
        small: with the small demo's settings.
    """

    def __init__(
        self,
        output: Path,
        *arguments: object,
        stdin: int = subprocess.DEVNULL,
        stop_at: str = "",
        small: bool = True,
    ):
        self.output = output
        faults = {"YXANUL_TEST_STOP_AT": stop_at, "PYTHONPATH": str(FAULTS_DIR)} if stop_at else {}
        with open(output, "wb") as handle:
            self.process = subprocess.Popen(
                command(*arguments) if small else [sys.executable, "launcher.py", *map(str, arguments)],
                cwd=REPO_DIR,
                env=os.environ | faults,
                stdin=stdin,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace")

    def worker(self, other_than: int | None = None) -> int:
        """Wait for a worker's process id."""
        return self._wait_for_one(self._workers, other_than, "worker")

    def group(self, other_than: int | None = None) -> int:
        """Wait for the process that starts the ranks of a machine; its process id."""
        return self._wait_for_one(lambda: self._children(b"yxanul_nemo.launch.ranks"), other_than, "group of ranks")

    def stopped_task(self, other_than: int | None = None) -> int:
        """Wait for a task at the place that it stops at; its process id."""
        return self._wait_for_one(self._stopped_tasks, other_than, "stopped task")

    def wait_until_printed(self, text: str) -> None:
        """Wait for a text in the output."""
        self.wait_until(lambda: text in self.text, f"'{text}'")

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for `what`, which is there when `condition()` is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no {what} came; the launcher printed:\n{self.text}")
            time.sleep(0.002)

    def wait_until_stopped(self) -> None:
        """Wait for the launcher itself to stop at the place that it stops at."""
        self.wait_until(lambda: state(self.process.pid) == "T", "stop")

    def end(self) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(PATIENCE_SECONDS)

    def _children(self, module: bytes) -> list[int]:
        """Not, for example, git, which the launcher asks for the commit."""
        return [child for child in children(self.process.pid) if module in _command_line(child)]

    def _workers(self) -> list[int]:
        return self._children(b"yxanul_nemo.launch.worker")

    def _stopped_tasks(self) -> list[int]:
        return [worker for worker in self._workers() if state(worker) == "T"]

    def _wait_for_one(self, find: Callable[[], list[int]], other_than: int | None, what: str) -> int:
        found: set[int] = set()

        def search() -> bool:
            found.update(set(find()) - {other_than})
            return bool(found)

        self.wait_until(search, what)
        return found.pop()


def children(pid: int) -> list[int]:
    """Process ids of the living children of a process."""
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [child for child in found if state(child) not in "ZX"]


def state(pid: int) -> str:
    """One letter, as ps shows it: T stopped, Z ended and not asked after, X gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
