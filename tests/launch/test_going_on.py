"""Runs that go on otherwise: more tokens, and branches from a checkpoint in the middle; killed in between, and nothing is lost."""

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus.manifest import load_manifest
from tests.launch.launching import Launched, launch, launch_alone
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.store import Checkpoint, CheckpointStore
from yxanul_nemo.config.load import load_run_config
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.curriculum.schedule import learning_rate
from yxanul_nemo.data.windows import corpus_shards, open_sources
from yxanul_nemo.training.reading import current_windows

WEIGHTS = "rank_00000.safetensors"
TOTAL = 18432


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is trained to its end."""
    folder = tmp_path_factory.mktemp("going_on") / "straight"
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, folder / part)
    done = launch("stage=train", f"run.dir={folder}")
    assert done.returncode == 0, done.stdout
    return folder


def newest(run_dir: Path) -> Checkpoint:
    return CheckpointStore(run_dir / "checkpoints").list()[-1]


def kill(output: Path, tokens: int, *arguments: object, task: bool = True) -> None:
    """Kill a command, and the task that it has begun, when a checkpoint is about to appear."""
    launched = Launched(output, *arguments, stop_at=f"tokens_{tokens:015d}", small=False)
    stopped = launched.stopped_task() if task else launched.wait_until_stopped()
    launched.process.kill()
    launched.process.wait()
    if stopped is not None:
        os.kill(stopped, signal.SIGKILL)


def test_a_branch_is_its_parent_until_something_differs(trained: Path, tmp_path: Path) -> None:
    branch, asked = tmp_path / "branch", ("stage=branch", f"from={trained}@10240")
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    kill(tmp_path / "killed.txt", 10240, *asked, f"run.dir={branch}", task=False)
    assert not (branch / "config.yaml").exists() and not list((branch / "checkpoints").glob("tokens_*"))
    done = launch_alone(*asked, f"run.dir={branch}")
    assert done.returncode == 0 and f"python launcher.py run.dir={branch}" in done.stdout, done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the parent stays as it was"
    again = launch_alone(*asked, f"run.dir={branch}")
    assert again.returncode == 2 and "has begun already" in again.stdout
    kill(tmp_path / "killed_in_training.txt", 14336, "stage=train", f"run.dir={branch}")
    done = launch_alone("stage=train", f"run.dir={branch}")
    assert done.returncode == 0, done.stdout
    ours, theirs = newest(branch), newest(trained)
    assert (ours.path / WEIGHTS).read_bytes() == (theirs.path / WEIGHTS).read_bytes()
    ledger, expected = ours.read_ledger(), theirs.read_ledger()
    assert [(one.run, one.at_tokens) for one in ledger.lineage] == [("straight", 10240)]
    assert ledger.model_copy(update={"lineage": ()}) == expected
    assert (branch / "metrics.jsonl").read_text().count("step_in_phase") == (
        trained / "metrics.jsonl"
    ).read_text().count("step_in_phase")
    listed = launch_alone("stage=status", f"runs=[{trained.parent}/*,{branch}]")
    assert "straight at 10,240" in listed.stdout and listed.stdout.count("18,432 of 18,432") == 2


def test_a_decay_from_the_middle(trained: Path, tmp_path: Path) -> None:
    """The phase under way ends early, and the rate falls to its end over what is left."""
    branch = tmp_path / "decay"
    changes = (
        "curriculum.phases.2.tokens=6144",
        "optim.decay=wsd",
        "optim.wsd_decay_ratio=0.125",
        "optim.min_lr_ratio=0",
    )
    refused = launch_alone("stage=branch", f"from={trained}@14336", f"run.dir={branch}", "data.seed=3", *changes)
    assert refused.returncode == 2 and "cannot change any more: data.seed" in refused.stdout, refused.stdout
    done = launch_alone("stage=branch", f"from={trained}@14336", f"run.dir={branch}", *changes)
    assert done.returncode == 0, done.stdout
    done = launch_alone("stage=train", f"run.dir={branch}")
    assert done.returncode == 0, done.stdout
    ledger = newest(branch).read_ledger()
    assert ledger.tokens_total == 16384
    assert {one.key for one in ledger.changes} >= {"optim.decay", "curriculum.phases.2.tokens"}
    assert {one.at_tokens for one in ledger.changes} == {14336}
    config = load_run_config(branch / "config.yaml")
    rates = [learning_rate(config.optim, tokens, 16384) for tokens in (14336, 15360, 16384)]
    assert rates[0] == config.optim.lr and rates[1] == pytest.approx(config.optim.lr / 2, rel=0.05) and rates[2] == 0


def test_a_branch_of_nothing_is_refused(trained: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((f"from={trained}@77", f"run.dir={tmp_path}/b"), "and one of 4096, 10240, "),
        ((f"from={tmp_path}/absent", f"run.dir={tmp_path}/b"), "holds no checkpoint"),
        ((f"from={trained}",), "run.dir: is not set"),
        ((f"run.dir={tmp_path}/b",), "from: is not set"),
    ):
        done = launch_alone("stage=branch", *arguments)
        assert done.returncode == 2 and said in done.stdout and "Traceback" not in done.stdout, done.stdout


def places(config: RunConfig, ledgers: Sequence[Ledger]) -> list[list[tuple[int, int]]]:
    """Where windows begin and end in each source, in the order in which phases read them."""
    names, data = config.data.source_names, config.data
    sources = open_sources(corpus_shards(config, load_manifest(config.data_dir)), data.seed, data.chunk_tokens)
    found: list[list[tuple[int, int]]] = [[] for _ in names]
    for ledger in ledgers:
        windows = current_windows(ledger, names, sources, data.shuffle_tokens)
        counts = windows.windows_before(ledger.phase_tokens // windows.seq_len)
        for number, count in enumerate(counts.tolist()):
            begins = windows.orders[number].places(0, count) if count else np.zeros(0, np.int64)
            found[number] += [(begin, begin + windows.seq_len) for begin in begins.tolist()]
    return found


def test_a_finished_run_takes_more_tokens_and_reads_none_twice(
    trained: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    longer, before = tmp_path / "longer", newest(trained).read_ledger()
    shutil.copytree(trained, longer)
    key = "curriculum.phases.2.tokens"
    plan = launch_alone("stage=plan", f"run.dir={longer}", f"{key}=12288", f"allow=[{key}]")
    assert plan.returncode == 0 and "22,528 tokens" in plan.stdout, plan.stdout
    # It is killed before its first new checkpoint, and goes on by the folder alone.
    kill(tmp_path / "killed.txt", 20480, "stage=train", f"run.dir={longer}", f"{key}=12288", f"allow=[{key}]")
    assert newest(longer).tokens == TOTAL
    done = launch_alone("stage=train", f"run.dir={longer}")
    assert done.returncode == 0, done.stdout
    ledger = newest(longer).read_ledger()
    assert ledger.tokens_total == 22528 and ledger.phases[:2] == before.phases[:2]
    assert [(one.key, one.before, one.now, one.at_tokens) for one in ledger.changes] == [(key, 8192, 12288, TOTAL)]
    config = load_run_config(longer / "config.yaml")
    ends = {one.tokens: one.read_ledger() for one in CheckpointStore(longer / "checkpoints").list()}
    read = places(config, [ends[4096], ends[10240], ledger])
    assert sum(end - begin for of_source in read for begin, end in of_source) == 22528
    for of_source in read:
        ordered = sorted(of_source)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ordered)), "a token was read twice"
    # What was read before is what the run read that was never made longer.
    for source, shorter in zip(read, places(config, [ends[4096], ends[10240], before]), strict=True):
        assert source[: len(shorter)] == shorter
    total = sum(phase.tokens for phase in plan_phases(config.curriculum))
    assert f"{learning_rate(config.optim, 20480, total)!r}" in (longer / "metrics.jsonl").read_text()


def test_a_further_phase_follows_a_finished_run(trained: Path, tmp_path: Path) -> None:
    longer = tmp_path / "further"
    shutil.copytree(trained, longer)
    phase = "+curriculum.phases.3={seq_len: 128, tokens: 2048, tokens_per_step: 1024, lr_scale: 0.5}"
    done = launch_alone("stage=train", f"run.dir={longer}", phase, "allow=[curriculum.phases.3]")
    assert done.returncode == 0, done.stdout
    ledger = newest(longer).read_ledger()
    assert (ledger.phase, ledger.tokens_total) == (4, TOTAL + 2048)
    assert ledger.phases[:3] == newest(trained).read_ledger().phases
    assert (longer / "validation" / "phase-04.json").is_file()
