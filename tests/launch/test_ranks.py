"""Several ranks on one machine, killed at each point of the way from one phase to the next, and their end after one has failed."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.launching import Launched, children, state
from tests.ranks import run_ranks
from tests.training import sessions
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.lock import RunLock

TWO = ("parallel.processes_per_node=2", "stage=train")


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    """A run that is ready to train."""
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / "run" / part)
    return tmp_path / "run"


def ranks_of(launched: Launched, other_than: int | None = None) -> tuple[int, list[int]]:
    """Process ids of a launcher's group and of its two ranks, in order, once they are there."""
    group = launched.group(other_than)
    launched.wait_until(lambda: len(children(group)) == 2, "two ranks")
    return group, children(group)


@pytest.mark.slow
def test_ranks_killed_on_their_way_from_phase_to_phase_end_as_if_nothing_had_happened(
    run_dir: Path, prepared: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    launched = Launched(tmp_path / "first", *TWO, f"run.dir={run_dir}", stop_at="tokens_000000000008192")
    group, (first, second) = ranks_of(launched)
    os.kill(second, signal.SIGKILL)
    launched.wait_until_printed("rank 1 was killed by SIGKILL")
    launched.wait_until_printed("phase-01 ended with code 137; trying once more from the last good checkpoint")
    assert state(first) in "ZX", "it imported, and is gone with the other"
    group, (first, second) = ranks_of(launched, other_than=group)
    launched.wait_until(lambda: state(first) == "T", "save in the second phase")
    assert children(group) == [first, second], "the same processes have gone on to the second phase"
    os.kill(second, signal.SIGKILL)
    os.kill(first, signal.SIGCONT)
    launched.wait_until_printed("phase-02 ended with code 137; trying once more from the last good checkpoint")
    ranks_of(launched, other_than=group)
    launched.process.kill()
    launched.process.wait()
    last = Launched(tmp_path / "last", *TWO, f"run.dir={run_dir}")
    assert last.end() == 0, last.text
    straight = make_config(f"run.dir={tmp_path}", TWO[0])
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / part)
    for phase in (1, 2, 3):
        assert run_ranks(sessions.train, 2, straight, (phase,)) == [[True]] * 2, "each phase in processes of its own"
    found, expected = (CheckpointStore(folder / "checkpoints").list()[-1] for folder in (run_dir, tmp_path))
    assert found.read_ledger() == expected.read_ledger()
    for rank in (0, 1):
        name = f"rank_{rank:05d}.safetensors"
        assert (found.path / name).read_bytes() == (expected.path / name).read_bytes()


def test_a_users_mistake_on_all_ranks_ends_them_with_2_and_without_a_second_try(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    launched = Launched(tmp_path / "output", *TWO, f"run.dir={run_dir}")
    assert launched.end() == 2
    assert "error: " in launched.text and "Traceback" not in launched.text and "once more" not in launched.text


def test_a_killed_launcher_and_a_killed_group_leave_no_ranks(run_dir: Path, tmp_path: Path) -> None:
    for kill_group in (False, True):
        launched = Launched(tmp_path / "output", *TWO, f"run.dir={run_dir}")
        group, ranks = ranks_of(launched)
        if kill_group:
            os.kill(group, signal.SIGKILL)
        launched.process.kill()
        launched.process.wait()
        with RunLock(run_dir, wait_seconds=60):
            assert all(state(pid) in "ZX" for pid in (group, *ranks))
