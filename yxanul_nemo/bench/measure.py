"""One case, timed: training's own backend, windows, reading and meter, in a loop of whole optimizer steps."""

import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from yxanul_nemo.bench.cases import Case
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.data.windows import Batch, BatchLayout, PhaseBatches, PhaseWindows
from yxanul_nemo.machine.agreement import any_rank
from yxanul_nemo.machine.gpus import read_power_watts
from yxanul_nemo.model.build import build_model
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.training.backend import Backend, forget_backends
from yxanul_nemo.training.build import make_backend
from yxanul_nemo.training.cuda_backend import CudaBackend
from yxanul_nemo.training.metrics import StepMeter

POWER_PERIOD_SECONDS = 0.25


@dataclass(frozen=True)
class Result:
    """What one case took. Times are of single steps."""

    step_seconds: list[float]
    """Every timed step, in order: device time between steps on a GPU."""
    data_wait_share: float
    """Part of the time in which the loop waited for a batch."""
    setup_seconds: float
    """From nothing to the first timed step: building, warm-up, compilation, graph capture."""
    peak_memory_bytes: int | None
    """Most that tensors took on the GPU."""
    power_watts: float | None
    """Mean of nvidia-smi's readings while steps ran."""
    uses_graph: bool
    """Whether the steps were replays of a CUDA graph."""
    loss_nats_per_token: float
    """Of the last step, as a sign that real training was timed."""
    kernels: list[tuple[str, float, int]] | None
    """(name, seconds, launches) of one step's kernels, longest first, if asked for."""

    @property
    def median_seconds(self) -> float:
        """Median of the steps."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        first, _, third = statistics.quantiles(self.step_seconds, n=4)
        return (third - first) / self.median_seconds


def measure(config: RunConfig, case: Case, windows: PhaseWindows, vocab_size: int, eos_id: int, device: str) -> Result:
    """Time `bench.steps` optimizer steps after `bench.warmup_steps`; everything that the case held is freed again."""
    config = config.model_copy(update={"precision": case.precision})
    forget_backends(device)
    began = time.perf_counter()
    phase, bench = case.phase, config.bench
    model = build_model(
        config.model, vocab_size, case.precision, config.parallel, config.run.seed, seq_len=phase.seq_len
    )
    backend = make_backend(model, config, device, eos_id)
    if isinstance(backend, CudaBackend):
        backend.prepare(case.micro_batch_size, case.accumulation, phase.seq_len)
    layout = BatchLayout(case.micro_batch_size, case.accumulation, parallel_state.get_data_parallel_world_size())
    rank = parallel_state.get_data_parallel_rank()
    last_step = bench.warmup_steps + bench.steps + 1
    batches = iter(PhaseBatches(windows, layout, rank, 0, last_step, pinned=device == "cuda"))
    steps = Steps(config, case, backend, batches, vocab_size, device)
    steps.run(bench.warmup_steps)
    setup_seconds = time.perf_counter() - began
    with power_readings(device) as watts:
        step_seconds, record = steps.run(bench.steps)
    result = Result(
        step_seconds=step_seconds,
        data_wait_share=record["data_wait_share"],
        setup_seconds=setup_seconds,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
        power_watts=statistics.fmean(watts) if watts else None,
        uses_graph=isinstance(backend, CudaBackend) and backend.uses_graph,
        loss_nats_per_token=record["loss_nats_per_token"],
        kernels=steps.profile() if bench.profile else None,
    )
    backend.close()
    return result


class Steps:
    """Optimizer steps as the training loop takes them: a batch, the step, the meter's record every `logging.every_steps`."""

    def __init__(
        self, config: RunConfig, case: Case, backend: Backend, batches: Iterator[Batch], vocab_size: int, device: str
    ):
        self.config, self.case, self.backend, self.batches, self.device = config, case, backend, batches, device
        flops = training_flops_per_token(config.model, vocab_size, case.phase.seq_len)
        self.meter = StepMeter(bytes_per_token=1.0, flops_per_token=flops)
        self.lr = config.optim.lr * case.phase.lr_scale * 0.1

    def run(self, count: int) -> tuple[list[float], Mapping[str, float]]:
        """Seconds of each of `count` steps, and the last record."""
        self._synchronize()
        self.meter.restart()
        events: list[torch.cuda.Event] = []
        clock: list[float] = []

        def mark() -> None:
            if self.device != "cuda":
                clock.append(time.perf_counter())
                return
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        mark()
        record: Mapping[str, float] = {}
        for i in range(1, count + 1):
            self._step()
            if i % self.config.logging.every_steps == 0 or i == count:
                record = self.meter.record()
            mark()
        self._synchronize()
        if events:
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)], record
        return [b - a for a, b in itertools.pairwise(clock)], record

    def profile(self) -> list[tuple[str, float, int]]:
        """Kernels of one step by the time that they take."""
        on_gpu = self.device == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            # A rank whose profiler is ready first would wait in a kernel.
            any_rank(False)
            self._step()
            self._synchronize()
        rows = [
            (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6, event.count)
            for event in profiler.key_averages()
        ]
        return sorted(rows, key=lambda row: -row[1])

    def _step(self) -> None:
        began = time.perf_counter()
        ids_ABT, labels_ABT = next(self.batches)
        self.meter.data_wait_seconds += time.perf_counter() - began
        phase = self.case.phase
        result = self.backend.train_step(ids_ABT, labels_ABT, self.lr, phase.grad_clip)
        self.meter.add(phase.tokens_per_step, result.loss, result.grad_norm, result.applied)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def power_readings(device: str) -> Iterator[list[float]]:
    """Collect this process's GPU's power draw in watts while the block runs; stays empty where it cannot be read."""
    watts: list[float] = []
    stopped = threading.Event()

    def read() -> None:
        while not stopped.wait(POWER_PERIOD_SECONDS):
            reading = read_power_watts(uuid)
            if reading is None:
                return
            watts.append(reading)

    if device != "cuda":
        yield watts
        return
    # nvidia-smi also counts GPUs that CUDA_VISIBLE_DEVICES hides. Not in the thread, whose own current GPU is the first.
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    thread = threading.Thread(target=read, name="power readings", daemon=True)
    thread.start()
    try:
        yield watts
    finally:
        stopped.set()
        thread.join()
