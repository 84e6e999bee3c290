"""The whole command, interrupted in every way, then finished: everything it makes, bit for bit as if nothing had happened."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.launch.launching import Launched, launch
from tests.ranks import run_ranks
from tests.training import sessions
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.config.run import RunConfig

TYPED_AHEAD = b"for the shell\n"
STEPS = 22


class Interrupted:
    """`stage=all` in four commands: Ctrl-C, a killed task and a killed launcher, the rest. Each test looks at a part of it."""

    def __init__(self, folder: Path):
        self.run_dir = folder / "run"
        self._folder = folder
        self._draw = random.Random()

    def ctrl_c(self) -> None:
        """A first command, until Ctrl-C in a terminal: the signal goes to the launcher's whole process group."""
        self.stdin, feed = os.pipe()
        os.write(feed, TYPED_AHEAD)
        os.close(feed)
        self.first = self._launch("first", self._draw.choice((2048, 4096)), stdin=self.stdin)
        task = self.first.stopped_task()
        os.killpg(self.first.process.pid, signal.SIGINT)
        self.first.wait_until_printed("stopping after this step to save")
        os.kill(task, signal.SIGCONT)
        self.first_code = self.first.end()
        self.first_saved_tokens = self.newest().tokens

    def kills(self) -> None:
        """A second command: its task is killed; tried again, it cannot go on while the launcher is killed."""
        self.second = self._launch("second", self._draw.choice((6144, 8192, 10240, 12288)))
        task = self.second.stopped_task()
        os.kill(task, signal.SIGKILL)
        self.left_behind = self.second.stopped_task(other_than=task)
        self.second.process.kill()
        self.second.process.wait()

    def finish(self) -> None:
        """A third command, which waits for what the second has left and does the rest."""
        self.third = self._launch("third")
        self.third.wait_until_printed(f"waiting for processes left behind by process {self.second.process.pid} on host")
        os.kill(self.left_behind, signal.SIGCONT)
        self.third_code = self.third.end()

    def newest(self) -> Checkpoint:
        """The newest checkpoint."""
        return CheckpointStore(self.run_dir / "checkpoints").list()[-1]

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file but locks and the launcher's own log."""
        return {
            path.relative_to(self.run_dir).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.run_dir.rglob("*")
            if path.is_file() and not path.name.endswith(".lock") and path.name != "launcher.log"
        }

    def _launch(self, name: str, stop_at_tokens: int | None = None, **more: int) -> Launched:
        """A command whose task stops when it is about to commit the checkpoint after so many tokens."""
        stop_at = f"tokens_{stop_at_tokens:015d}" if stop_at_tokens else ""
        return Launched(self._folder / name, "stage=all", f"run.dir={self.run_dir}", stop_at=stop_at, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupted]:
    forkserver.ensure_running()  # Its imports go on beside the launcher's.
    interrupted = Interrupted(tmp_path_factory.mktemp("interrupted"))
    try:
        interrupted.ctrl_c()
        interrupted.kills()
        interrupted.finish()
        yield interrupted
    finally:
        for name in ("first", "second", "third"):
            if hasattr(interrupted, name):
                getattr(interrupted, name).process.kill()


def test_ctrl_c_saves_and_says_how_to_go_on(run: Interrupted) -> None:
    assert run.first_code == 130
    assert "stopped by SIGINT in phase-0" in run.first.text
    assert "the state is saved. Repeat the command to go on." in run.first.text
    assert f"stopped by SIGINT at {run.first_saved_tokens:,} tokens, saved" in run.first.text
    assert "Traceback" not in run.first.text


def test_a_killed_task_is_tried_once_more(run: Interrupted) -> None:
    assert run.second.text.count("was killed by SIGKILL; trying once more from the last good checkpoint") == 1


def test_what_was_interrupted_ends_as_if_it_had_not_been(
    run: Interrupted, prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    assert run.third_code == 0, run.third.text
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / part)
    straight = make_config(f"run.dir={tmp_path}")
    assert run_ranks(sessions.train, 1, straight, (1, 2, 3)) == [[True] * 3]
    checkpoint, expected = run.newest(), CheckpointStore(tmp_path / "checkpoints").list()[-1]
    assert checkpoint.read_ledger() == expected.read_ledger()
    name = "rank_00000.safetensors"
    assert (checkpoint.path / name).read_bytes() == (expected.path / name).read_bytes()
    records = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["steps"] for record in records) == STEPS


def test_everything_of_a_run_is_in_its_folder(run: Interrupted, make_config: Callable[..., RunConfig]) -> None:
    names = {path.name for path in run.run_dir.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.yaml", "environment.json", "metrics.jsonl"),
        *("tokenizer", "data", "checkpoints", "validation", "export", "logs"),
    }
    assert load_run_config(run.run_dir / "config.yaml") == make_config(f"run.dir={run.run_dir}")
    environment = json.loads((run.run_dir / "environment.json").read_text())
    assert len(environment["earlier"]) == 2
    for described in (environment, *environment["earlier"]):
        for name in ("command", "started", "host", "commit", "python", "system", "cpu", "cpu_cores", "memory_bytes"):
            assert described[name], name
        assert "stage=all" in described["command"] and described["packages"]["torch"]
    bits = [
        json.loads((run.run_dir / "validation" / f"phase-0{number}.json").read_text())["mean_bits_per_byte"]
        for number in (1, 2, 3)
    ]
    assert bits[0] > bits[1] > bits[2]
    assert {path.name for path in (run.run_dir / "export").iterdir()} == {"hf", "model.nemo", "export.json"}
    assert run.newest().phase_end and run.newest().phase == 3
    logs = {path.name for path in (run.run_dir / "logs").iterdir()}
    assert logs == {"launcher.log", "phase-01.log", "phase-02.log", "phase-03.log", "export.log"}


def test_standard_input_is_left_to_the_shell(run: Interrupted) -> None:
    assert os.read(run.stdin, 100) == TYPED_AHEAD


def test_a_repeated_command_does_nothing(run: Interrupted) -> None:
    before = run.files()
    done = launch("stage=all", f"run.dir={run.run_dir}")
    assert done.returncode == 0, done.stdout
    assert run.files() == before
    for task in ("phase-01", "phase-02", "phase-03", "validate", "export"):
        assert f"{task}: done already" in done.stdout


def test_a_finished_run_cannot_become_another(run: Interrupted) -> None:
    before = run.files()
    done = launch("stage=all", f"run.dir={run.run_dir}", "optim.lr=1e-3")
    assert done.returncode == 2 and "it is of another run: config: " in done.stdout, done.stdout
    assert run.files() == before
