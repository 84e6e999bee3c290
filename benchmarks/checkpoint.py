"""What a checkpoint costs: how long training waits for a save, how long its thread writes, how long loading takes.

    python -m benchmarks.checkpoint --device cuda --folder /local/disk recipe=yxanul_197m_h100

State is that of training by the recipe: weights, moments and, in FP8, scales. Each figure is the median of `--repeats`;
saves are of different token counts, two are kept. Before each load the kernel is asked to forget the files (fadvise), so they come
from the disk; `warm` is the same from the page cache. `--json` also writes the figures to a file.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.ledger import Expected, Ledger, PhasePlan
from yxanul_nemo.checkpoint.shards import ShardReader
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.load import compose, parse, to_yaml
from yxanul_nemo.model.build import build_model
from yxanul_nemo.training.build import make_backend
from yxanul_nemo.training.cuda_backend import CudaBackend
from yxanul_nemo.training.saving import CheckpointSaver

PLAN = PhasePlan(seq_len=1, tokens_per_step=1, planned_tokens=10**6, lr_scale=1.0, grad_clip=1.0)
WARMUP_WINDOWS, WARMUP_LEN = 2, 64


def ledger_at(tokens: int) -> Ledger:
    """A ledger of a run of one source after so many steps of one token."""
    expected = Expected(
        corpus_fingerprint="benchmark",
        tokenizer_fingerprint="benchmark",
        model_fingerprint="benchmark",
        config_fingerprint="benchmark",
        window_order="benchmark",
        phases=(PLAN,),
    )
    return Ledger.fresh(expected).start_phase(PLAN, 1, 1).consume(tokens, {"text": tokens})


def seconds(act: Callable[[], object]) -> float:
    """Time of one call, with the device idle at both ends."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drop the pages of a folder's files, which are on disk already, from memory."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(overrides: list[str], device: str, vocab_size: int, folder: Path, repeats: int) -> dict[str, float]:
    """Medians in seconds, and the size of one checkpoint."""
    precision = [] if device == "cuda" else ["precision=fp32", "parallel.layer_spec=torch"]
    config = parse(compose([*overrides, *precision, f"parallel.device={device}"]))
    model = build_model(config.model, vocab_size, config.precision, config.parallel, config.run.seed)
    backend = make_backend(model, config, device)
    if isinstance(backend, CudaBackend):
        # FP8's scales exist only after a pass.
        backend.prepare(WARMUP_WINDOWS, 1, WARMUP_LEN)
    store = CheckpointStore(folder, keep_latest=2)
    times: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)

    def read(checkpoint: Checkpoint) -> None:
        ShardReader(checkpoint.path).load_into(backend.sharded_state())

    tokens = 0
    for mode in ("blocking", "asynchronous"):
        began = time.perf_counter()
        saver = CheckpointSaver(store, backend.sharded_state, to_yaml(config), asynchronous=mode == "asynchronous")
        note("allocate_buffers", time.perf_counter() - began)
        # The first one pays for pages that are touched for the first time.
        for repeat in range(repeats + 1):
            tokens += 1
            ledger = ledger_at(tokens)
            blocked = seconds(partial(saver.start, ledger, phase_end=False))
            saver.wait()
            if repeat:
                note(f"training_waits_{mode}", blocked)
                note("write_in_background", saver.written_seconds())
    for _ in range(repeats):
        note("describe_state", seconds(backend.sharded_state))
        newest = store.list()[-1]
        forget(newest.path)
        for temperature in ("cold", "warm"):
            note(f"verify_{temperature}", seconds(store.newest_good))
            taken = seconds(partial(read, newest))
            note("read_after_verify", taken)
            note(f"load_{temperature}", times[f"verify_{temperature}"][-1] + taken)
    size_bytes = sum(entry.size_bytes for entry in newest.manifest.files.values())
    return {"checkpoint_gb": size_bytes / 1e9} | {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where to save; a fresh folder inside it is used and removed")
    parser.add_argument("--vocab-size", type=int, default=200_005)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", default=["recipe=yxanul_197m_h100"], help="the run: key=value ...")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_benchmark-", dir=options.folder))
    try:
        figures = measure(options.overrides, options.device, options.vocab_size, folder, options.repeats)
    finally:
        shutil.rmtree(folder)
    for name, value in figures.items():
        print(f"{name:<28} {value:8.3f}")
    share = figures["training_waits_asynchronous"] / figures["training_waits_blocking"]
    print(f"{'asynchronous / blocking':<28} {share:8.1%}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
