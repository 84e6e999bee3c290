"""Worker processes, each with a tokenizer of its own: whole shards while there are enough of them, pieces of one shard after that.
What makes them fast is made once, by the parent, while they start.

Workers are started afresh (`spawn`): a fork would copy the tokenizer library's threads in an unusable state. Each has a pipe of its
own to the parent and ends when that closes, so that none outlives a parent that was killed.
"""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import numpy as np

from data_prep.corpus.encode import CHUNK_BYTES, BulkEncoder, Encoder, Progress, ShardRecord, ShardTask, prepare_shard
from data_prep.tokenizers.superword_encoder import SuperwordEncoder
from yxanul_nemo.errors import UserError

PIECE_CHARS = 512 << 10
"""Text sent to a worker at a time when several work on one shard."""
CHUNK_BYTES_PER_WORKER = 4 << 20
"""Text of a shard in hand for each worker then: many pieces, so that none waits long for the others."""
SHARED_SHARDS = 3
"""Shards that all workers share at most: this process, which reads, splits and writes them, keeps up with about four workers."""


@dataclass(frozen=True)
class ShardOutcome:
    """How a shard ended: with a record, refused with the message of a UserError, or with the output not writable."""

    task: ShardTask
    record: ShardRecord | None = None
    refused: str = ""
    write_errno: int = 0
    write_error: str = ""


def attempt_shard(
    task: ShardTask, encoder: Encoder, report: Callable[[Progress], None], chunk_bytes: int = CHUNK_BYTES
) -> ShardOutcome:
    """`prepare_shard` with the errors that are not ours turned into an outcome."""
    try:
        return ShardOutcome(task, record=prepare_shard(task, encoder, report, chunk_bytes))
    except UserError as error:
        return ShardOutcome(task, refused=str(error))
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        return ShardOutcome(task, write_errno=error.errno or errno.EIO, write_error=str(error))


def run_shards(
    tasks: list[ShardTask],
    encoder: BulkEncoder,
    load_encoder: Callable[[], BulkEncoder],
    cores: int,
    use_processes: bool,
    on_progress: Callable[[Progress], None],
) -> Iterator[ShardOutcome]:
    """Prepare all shards, yielding outcomes as they come; leaving the loop early stops all work.

    Args:
        encoder: used in this process.
        load_encoder: makes the same one in a worker process; must be picklable.
        use_processes: start `cores` worker processes instead of using the tokenizer's threads in this one.
        on_progress: called in this process for each piece of work done.
    """
    if cores == 1 or not use_processes:
        with encoder_threads(cores):
            for task in tasks:
                yield attempt_shard(task, encoder, on_progress)
        return
    with WorkerPool(load_encoder, cores) as pool:
        if not all(task.options.holds_ids for task in tasks):
            pool.use_bulk_encoder(encoder)
        # Whole shards need no traffic between processes. A few left over after the last full round are shared by all workers.
        left_over = len(tasks) % cores
        alone = len(tasks) - (left_over if left_over <= SHARED_SHARDS else 0)
        yield from pool.run(tasks[:alone], on_progress)
        shared = SharedEncoder(encoder, pool)
        for task in tasks[alone:]:
            yield attempt_shard(task, shared, on_progress, CHUNK_BYTES_PER_WORKER * cores)


class WorkerPool:
    """Processes that hold a tokenizer; a context manager that leaves none behind.

    Raises RuntimeError if one dies.
    """

    def __init__(self, load_encoder: Callable[[], BulkEncoder], processes: int):
        self._load_encoder, self._processes = load_encoder, processes
        self._workers: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        with encoder_threads(1):
            for _ in range(self._processes):
                ours, theirs = context.Pipe()
                worker = context.Process(
                    target=_work, args=(theirs, self._load_encoder), daemon=True, name="data-worker"
                )
                worker.start()
                theirs.close()
                self._workers[ours] = worker
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe, worker in self._workers.items():
            pipe.close()
            worker.terminate()
        for worker in self._workers.values():
            worker.join()

    def use_bulk_encoder(self, encoder: BulkEncoder) -> None:
        """Give all workers the faster way of `encoder`, made once, while they start."""
        made = encoder.bulk_encoder()
        if made is not None:
            for pipe in self._workers:
                with self._deaths_named(pipe):
                    pipe.send(made)

    def run(self, tasks: list[ShardTask], on_progress: Callable[[Progress], None]) -> Iterator[ShardOutcome]:
        """Prepare whole shards, one per worker at a time, in the order given."""
        for _, message in self._serve(tasks):
            if isinstance(message, Progress):
                on_progress(message)
            else:
                yield message

    def encode(self, pieces: list[list[str]]) -> list[list[np.ndarray]]:
        """Ids of each text of each piece."""
        encoded = dict(self._serve(pieces))
        return [encoded[number] for number in range(len(pieces))]

    def _serve(self, requests: Sequence[ShardTask | list[str]]) -> Iterator[tuple[int, Any]]:
        """Hand out requests to idle workers; yields (number of the request, message) for whatever they send back."""
        waiting = iter(enumerate(requests))
        busy: dict[Connection, int] = {}
        idle = list(self._workers)
        while True:
            while idle and (request := next(waiting, None)) is not None:
                pipe = idle.pop()
                busy[pipe] = request[0]
                with self._deaths_named(pipe):
                    pipe.send(request[1])
            if not busy:
                return
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                with self._deaths_named(pipe):
                    message = pipe.recv()
                number = busy[pipe]
                if not isinstance(message, Progress):
                    del busy[pipe]
                    idle.append(pipe)
                yield number, message

    @contextmanager
    def _deaths_named(self, pipe: Connection) -> Iterator[None]:
        """Turn the end of a worker's pipe into what ended the worker."""
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError):
            worker = self._workers[pipe]
            worker.join()
        else:
            return
        code = worker.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (the system kills what uses too much memory: set data.workers lower)" if name == "SIGKILL" else ""
            raise RuntimeError(f"a worker process of the data stage was killed by {name}{hint}")
        raise RuntimeError(f"a worker process of the data stage ended with exit code {code}; its traceback is above")


class SharedEncoder:
    """An encoder that spreads each batch over the workers of a pool."""

    def __init__(self, encoder: Encoder, pool: WorkerPool):
        self._encoder, self._pool = encoder, pool
        self.vocab_size, self.eos_id, self.fingerprint = encoder.vocab_size, encoder.eos_id, encoder.fingerprint

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""
        pieces: list[list[str]] = [[]]
        held = 0
        for text in texts:
            if held >= PIECE_CHARS:
                pieces.append([])
                held = 0
            pieces[-1].append(text)
            held += len(text)
        return [ids for piece in self._pool.encode(pieces) for ids in piece]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids."""
        return self._encoder.decode(ids)


@contextmanager
def encoder_threads(threads: int) -> Iterator[None]:
    """Environment under which `tokenizers` uses this many threads, here and in processes started meanwhile."""
    wanted = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _work(pipe: Connection, load_encoder: Callable[[], BulkEncoder]) -> None:
    """Life of a worker: a shard or a list of texts comes in, an outcome or their ids go out, until the pipe closes. First of all
    the faster encoder may come.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides.
    encoder = load_encoder()
    try:
        while True:
            request = pipe.recv()
            if isinstance(request, ShardTask):
                pipe.send(attempt_shard(request, encoder, pipe.send))
            elif isinstance(request, SuperwordEncoder):
                encoder.use_bulk_encoder(request)
            else:
                pipe.send(encoder.encode_batch(request))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
