"""The whole command, interrupted in every way, then finished: everything it makes, bit for bit as if nothing had happened."""

import json
import os
import random
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.launch.launching import Launched, launch, launch_alone
from tests.ranks import run_ranks
from tests.training import sessions
from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.config.run import RunConfig

TYPED_AHEAD = b"for the shell\n"
STEPS = 22


class Runs:
    """Two runs: one is stopped by Ctrl-C; `stage=all` of the other is killed twice and then finished. Tests look at parts of it.

    A worker's imports take most of the time, so the two go on side by side.
    """

    def __init__(self, folder: Path, prepared: Path):
        self.folder, self.run_dir, self.stopped_dir = folder, folder / "run", folder / "stopped"
        for part in ("data", "tokenizer"):
            shutil.copytree(prepared / part, self.stopped_dir / part)
        draw = random.Random()
        self.stdin, feed = os.pipe()
        os.write(feed, TYPED_AHEAD)
        os.close(feed)
        self.stopped = self._launch(self.stopped_dir, "stopped.txt", "stage=train", 2048, stdin=self.stdin)
        self.killed = self._launch(self.run_dir, "killed.txt", "stage=all", draw.choice((2048, 6144, 10240, 12288)))

    def ctrl_c(self) -> None:
        """Ctrl-C in a terminal, in the middle of a save: the signal goes to the launcher's whole process group."""
        task = self.stopped.stopped_task()
        os.killpg(self.stopped.process.pid, signal.SIGINT)
        self.stopped.wait_until_printed("stopping after this step to save")
        os.kill(task, signal.SIGCONT)
        self.stopped_code = self.stopped.end()

    def kills(self) -> None:
        """The other's task is killed in the middle of a save; tried again, it cannot go on while the launcher is killed."""
        task = self.killed.stopped_task()
        os.kill(task, signal.SIGKILL)
        self.left_behind = self.killed.stopped_task(other_than=task)
        self.killed.process.kill()
        self.killed.process.wait()

    def finish(self) -> None:
        """The same command again: it waits for what the killed one has left and does the rest."""
        self.last = self._launch(self.run_dir, "last.txt", "stage=all")
        self.last.wait_until_printed(f"waiting for processes left behind by process {self.killed.process.pid} on host")
        os.kill(self.left_behind, signal.SIGCONT)
        self.last_code = self.last.end()

    def close(self) -> None:
        """Leave no process behind, also where a test has failed half-way."""
        for name in ("stopped", "killed", "last"):
            if hasattr(self, name):
                getattr(self, name).process.kill()
        os.close(self.stdin)

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file but locks and the launcher's own log."""
        return {
            path.relative_to(self.run_dir).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.run_dir.rglob("*")
            if path.is_file() and not path.name.endswith(".lock") and path.name != "launcher.log"
        }

    def _launch(self, run_dir: Path, output: str, stage: str, stop_at_tokens: int = 0, **more: int) -> Launched:
        """A command whose task stops when it is about to commit the checkpoint after so many tokens."""
        stop_at = f"tokens_{stop_at_tokens:015d}" if stop_at_tokens else ""
        return Launched(self.folder / output, stage, f"run.dir={run_dir}", stop_at=stop_at, **more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("end_to_end"), prepared)
    try:
        made.kills()
        made.ctrl_c()
        forkserver.ensure_running()  # Its imports go on beside the launcher's.
        made.finish()
        yield made
    finally:
        made.close()


def newest(run_dir: Path) -> Checkpoint:
    return CheckpointStore(run_dir / "checkpoints").list()[-1]


def test_ctrl_c_saves_and_says_how_to_go_on(runs: Runs) -> None:
    text = runs.stopped.text
    assert runs.stopped_code == 130
    assert "stopped by SIGINT in phase-01: the state is saved. Repeat the command to go on." in text
    assert f"stopped by SIGINT at {newest(runs.stopped_dir).tokens:,} tokens, saved" in text
    assert "Traceback" not in text


def test_a_killed_task_is_tried_once_more(runs: Runs) -> None:
    assert runs.killed.text.count("was killed by SIGKILL; trying once more from the last good checkpoint") == 1


def test_what_was_interrupted_ends_as_if_it_had_not_been(
    runs: Runs, prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    assert runs.last_code == 0, runs.last.text
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / part)
    straight = make_config(f"run.dir={tmp_path}")
    assert run_ranks(sessions.train, 1, straight, (1, 2, 3)) == [[True] * 3]
    checkpoint, expected = newest(runs.run_dir), newest(tmp_path)
    assert checkpoint.read_ledger() == expected.read_ledger()
    name = "rank_00000.safetensors"
    assert (checkpoint.path / name).read_bytes() == (expected.path / name).read_bytes()
    records = [json.loads(line) for line in (runs.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["steps"] for record in records) == STEPS


def test_everything_of_a_run_is_in_its_folder(runs: Runs, make_config: Callable[..., RunConfig]) -> None:
    names = {path.name for path in runs.run_dir.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.yaml", "environment.json", "metrics.jsonl"),
        *("tokenizer", "data", "checkpoints", "validation", "export", "logs"),
    }
    assert load_run_config(runs.run_dir / "config.yaml") == make_config(f"run.dir={runs.run_dir}")
    environment = json.loads((runs.run_dir / "environment.json").read_text())
    assert len(environment["earlier"]) == 1
    for described in (environment, *environment["earlier"]):
        for name in ("command", "started", "host", "commit", "python", "system", "cpu", "cpu_cores", "memory_bytes"):
            assert described[name], name
        assert "stage=all" in described["command"] and described["packages"]["torch"]
    bits = [
        json.loads((runs.run_dir / "validation" / f"phase-0{number}.json").read_text())["mean_bits_per_byte"]
        for number in (1, 2, 3)
    ]
    assert bits[0] > bits[1] > bits[2]
    assert {path.name for path in (runs.run_dir / "export").iterdir()} == {"hf", "model.nemo", "export.json"}
    assert newest(runs.run_dir).phase_end and newest(runs.run_dir).phase == 3
    logs = {path.name for path in (runs.run_dir / "logs").iterdir()}
    assert logs == {"launcher.log", "phase-01.log", "phase-02.log", "phase-03.log", "export.log"}


def test_standard_input_is_left_to_the_shell(runs: Runs) -> None:
    assert os.read(runs.stdin, 100) == TYPED_AHEAD


def test_a_repeated_command_does_nothing(runs: Runs) -> None:
    before = runs.files()
    done = launch("stage=all", f"run.dir={runs.run_dir}")
    assert done.returncode == 0, done.stdout
    assert runs.files() == before
    for task in ("phase-01", "phase-02", "phase-03", "validate", "export"):
        assert f"{task}: done already" in done.stdout


TEN_CHANGES = {
    "optim.lr=1e-3": "optim.lr: 0.01 there, 0.001 here",
    "curriculum.phases.2.lr_scale=0.5": "curriculum.phases.2.lr_scale: 1 there, 0.5 here",
    "model.ffn_hidden_size=128": "model.ffn_hidden_size: 64 there, 128 here",
    "run.seed=7": "run.seed: 1234 there, 7 here",
    "data.seed=7": "data.seed: 1234 there, 7 here",
    "optim=adamw": "optim: muon there, adamw here",
    "curriculum.total_tokens=36864": "curriculum.phases.0.tokens: 4096 there, 8192 here",
    "curriculum.phases.2.tokens=16384": "curriculum.phases.2.tokens: 8192 there, 16384 here",
    "+curriculum.phases.3={seq_len: 128, tokens: 4096, tokens_per_step: 1024}": "curriculum.phases.3: unset there, {",
    "data.document_mask=true": "data.document_mask: false there, true here",
}


@pytest.mark.parametrize("change", TEN_CHANGES)
def test_a_change_of_a_finished_run_is_named_and_the_advice_works(runs: Runs, change: str) -> None:
    """The run is changed by `stage=plan`, which refuses what training would refuse and changes nothing."""
    before = runs.files()
    done = launch("stage=all", f"run.dir={runs.run_dir}", change)
    assert done.returncode == 2 and TEN_CHANGES[change] in done.stdout, done.stdout
    assert runs.files() == before
    advised = re.findall(r"'(allow=\[[^']*\])'", done.stdout)
    cannot = "cannot change any more" in done.stdout
    assert cannot or advised, "there is a way, or it is said that there is none"
    if command := re.search(r"more tokens: python launcher\.py (.*?)\. To go on", done.stdout):
        again = shlex.split(command[1])
    else:
        again = [f"run.dir={runs.run_dir}", *([] if cannot else [change, *advised])]
    with_advice = launch_alone("stage=plan", *again)
    assert with_advice.returncode == 0, with_advice.stdout
    (runs.run_dir / "plan.json").unlink()


def test_the_folder_alone_says_what_run_it_is(runs: Runs) -> None:
    before = runs.files()
    done = launch_alone(f"run.dir={runs.run_dir}")
    assert done.returncode == 0 and f"settings are those of the run in {runs.run_dir}" in done.stdout, done.stdout
    for task in ("phase-01", "phase-02", "phase-03", "validate", "export"):
        assert f"{task}: done already" in done.stdout
    status = launch_alone("stage=status", f"run.dir={runs.run_dir}", "optim.lr=1e-3")
    assert (
        "18,432 of 18,432" in status.stdout and "shown by these; the command line's differ in optim.lr" in status.stdout
    )
    written = launch_alone("stage=generate", f"run.dir={runs.run_dir}", "prompt=The", "generate.max_new_tokens=2")
    assert written.returncode == 0, written.stdout
    assert launch_alone("stage=cancel", f"run.dir={runs.run_dir}").returncode == 2, "nothing is at work"
    assert runs.files() == before


def test_what_decides_nothing_of_training_changes_freely(runs: Runs) -> None:
    before = runs.files()
    done = launch_alone(
        f"run.dir={runs.run_dir}", "logging.every_steps=7", "parallel.micro_batch_tokens=512", "stage=train"
    )
    assert done.returncode == 0 and "changes" not in done.stdout, done.stdout
    assert runs.files() == before


def test_an_export_is_not_replaced_by_one_with_fewer_formats(runs: Runs) -> None:
    before = runs.files()
    done = launch("stage=export", f"run.dir={runs.run_dir}", "export.formats=[hf]")
    assert done.returncode == 2 and "has nemo too, which would be removed" in done.stdout, done.stdout
    assert "export.formats=[nemo,hf]" in done.stdout and runs.files() == before


def test_plan_and_report_of_the_finished_run(runs: Runs, tmp_path: Path) -> None:
    for stage in ("plan", "report"):
        done = launch(f"stage={stage}", f"run.dir={runs.run_dir}", f"report.dir={tmp_path}", "report.sample_tokens=5")
        assert done.returncode == 0, done.stdout
        if stage == "plan":
            assert done.stdout.count("100%") == 4 and f"written: {runs.run_dir / 'plan.json'}" in done.stdout
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "finished" in page and page.count('class="sample"') == 6
    assert f"run.dir={runs.run_dir}" in page, "the command is named"
    samples = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert {sample["phase"] for sample in samples} == {1, 2, 3} and all(1 <= s["tokens"] <= 5 for s in samples)
