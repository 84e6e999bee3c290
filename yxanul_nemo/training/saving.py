"""Checkpoints written behind training's back: training waits for a copy into host memory, a thread does the rest.

At most one save is under way. What ranks agree on about it goes through a process group of its own, so that it cannot
come between the collectives of training.
"""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.snapshot import HostSnapshot
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.disk_errors import disk_errors
from yxanul_nemo.log import logger
from yxanul_nemo.machine.agreement import failing_together, from_first_rank


@cache
def _group() -> dist.ProcessGroup | None:
    """For the threads that save, and for nothing else; one in a process."""
    return dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None


@dataclass
class _Save:
    ledger: Ledger
    phase_end: bool
    ended: threading.Event = field(default_factory=threading.Event)
    checkpoint: Checkpoint | None = None
    error: BaseException | None = None
    """Taken away when it is raised."""
    seconds: float = 0.0
    """Taken away when they are told."""


class CheckpointSaver:
    """Commits checkpoints of one rank's state together with the other ranks; every rank makes the same calls.

    Args:
        store: where they go; only the first rank touches it.
        state: gives the nested dict of `ShardedTensor`s over live storage.
        config_yaml: kept in each checkpoint.
        asynchronous: whether `start` returns as soon as the state is copied, or only after the commit.
    """

    def __init__(self, store: CheckpointStore, state: Callable[[], Any], config_yaml: str, asynchronous: bool = True):
        self.store, self.asynchronous = store, asynchronous
        self._state, self._config_yaml = state, config_yaml
        self._rank = dist.get_rank()
        self._group = _group()
        # Before training, which it would delay later: pinning memory takes a second per few GB.
        self._snapshot = HostSnapshot(state())
        self._save: _Save | None = None

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed; `wait` raises the error."""
        save = self._save
        return save is not None and save.ended.is_set() and save.error is not None

    def start(self, ledger: Ledger, phase_end: bool) -> None:
        """Save the state as it is now, once the save before is done.

        Args:
            ledger: of this moment.
            phase_end: whether the ledger's phase is finished.

        Raises:
            UserError: the save before has failed, or, if not asynchronous, this one.
        """
        self.wait()
        self._snapshot.take(self._state())
        save = self._save = _Save(ledger, phase_end)
        # A daemon: what ends the process at once (a second Ctrl-C) must not wait for it. An unfinished save is never seen.
        threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True).start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> Checkpoint | None:
        """Wait for the save that was started last; its checkpoint, or None if there was none or it has failed before.

        Raises:
            UserError: the disk is full and the like, on any rank. Older checkpoints are as they were.
        """
        save = self._save
        if save is None:
            return None
        save.ended.wait()
        error, save.error = save.error, None
        if error is not None:
            raise error
        return save.checkpoint

    def written_seconds(self) -> float:
        """Time that the last save took in the background, once, when it has ended; otherwise 0."""
        save = self._save
        if save is None or not save.ended.is_set():
            return 0.0
        seconds, save.seconds = save.seconds, 0.0
        return seconds

    def _run(self, save: _Save) -> None:
        began = time.perf_counter()
        try:
            save.checkpoint = self._write(save.ledger, save.phase_end)
            logger.info("saved %s", save.checkpoint.path)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
            save.error = error
        finally:
            save.seconds = time.perf_counter() - began
            save.ended.set()

    def _write(self, ledger: Ledger, phase_end: bool) -> Checkpoint:
        """Every rank writes its pieces, the first one the ledger and the manifest."""
        temporary: Path = from_first_rank(lambda: self.store.begin(ledger.tokens_total), self._group)
        # Inside out: each rank's errors become the user's, all ranks learn of them, and then the first removes what is there.
        removing = self.store.writing(temporary) if self._rank == 0 else nullcontext()
        disk = disk_errors(self.store.root, "saving a checkpoint", also=(SafetensorError,))
        with removing, failing_together(self._group), disk:
            self._snapshot.write(temporary, self._rank)
            if self._rank == 0:
                (temporary / "config.yaml").write_text(self._config_yaml, encoding="utf-8")
        return from_first_rank(lambda: self.store.commit(temporary, ledger, phase_end), self._group)
