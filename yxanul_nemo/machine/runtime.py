"""What this process runs on: the device, the layer spec that can run there, and the process groups."""

import importlib.metadata
import importlib.util
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from yxanul_nemo.config.training import NumberFormat, ParallelConfig, PrecisionConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger
from yxanul_nemo.machine.gpus import rank_and_processes
from yxanul_nemo.machine.number_formats import require_on_cpu, require_on_gpu

QUIET_JOIN_SECONDS = 20.0
"""How long ranks may take to come before one says that it waits."""
SIGNAL_SECONDS = 0.2
"""How long a signal may wait for its answer."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def resolve_device(parallel: ParallelConfig) -> str:
    """`cuda` or `cpu`; raises UserError if a GPU is asked for and absent."""
    has_gpu = torch.cuda.is_available()
    if parallel.device == "cuda" and not has_gpu:
        raise UserError(
            "parallel.device",
            "is cuda, but torch finds no GPU",
            "an NVIDIA GPU and its driver",
            "Use parallel.device=cpu.",
        )
    return "cuda" if has_gpu and parallel.device != "cpu" else "cpu"


def te_version() -> str | None:
    """Version of Transformer Engine, or None where it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    return importlib.metadata.version("transformer_engine")


def resolve_layer_spec(parallel: ParallelConfig, device: str) -> str:
    """`te` or `torch`; Transformer Engine cannot even build its modules without a GPU."""
    if parallel.layer_spec == "te":
        if device != "cuda":
            raise UserError("parallel.layer_spec", "is te on a CPU", "torch", "Transformer Engine needs an NVIDIA GPU.")
        if te_version() is None:
            raise UserError(
                "parallel.layer_spec",
                "is te, but Transformer Engine is not installed",
                fix="Run `uv sync --inexact --extra te`.",
            )
    found = parallel.layer_spec
    if found == "auto":
        found = "te" if device == "cuda" and te_version() is not None else "torch"
    if parallel.context_parallel > 1 and found == "torch":
        raise UserError(
            "parallel.context_parallel",
            f"is {parallel.context_parallel}, but layers are plain torch here",
            "1, or GPUs with Transformer Engine",
            "Ranks can share a window only in Transformer Engine's attention.",
        )
    return found


def check_precision(precision: PrecisionConfig, parallel: ParallelConfig, device: str) -> None:
    """Refuse number formats that this machine cannot compute in, with the reason and the nearest that it can."""
    if device == "cpu":
        require_on_cpu(precision, way_out="train on a GPU")
        return
    if not precision.is_fp8:
        return
    if resolve_layer_spec(parallel, device) != "te":
        raise UserError(
            "precision.name",
            f"is {precision.name} without Transformer Engine",
            "bf16, or Transformer Engine",
            "Run `uv sync --inexact --extra te`.",
        )
    require_on_gpu(precision, torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def formats_of(precision: PrecisionConfig, parallel: ParallelConfig, device: str) -> tuple[NumberFormat, ...]:
    """The number format of `precision`; of `auto` those that a phase may come to be trained in on this machine, FP8 first."""
    if precision.name != "auto":
        return (precision.name,)
    if device == "cpu":
        return ("fp32",)
    try:
        check_precision(precision.named("fp8_hybrid"), parallel, device)
    except UserError:
        return ("bf16",)
    return ("fp8_hybrid", "bf16")


def outside_training(precision: PrecisionConfig, parallel: ParallelConfig, device: str) -> PrecisionConfig:
    """What a model that is only used computes in: BF16 where it was trained in FP8.

    FP8's delayed scales follow from training passes. Weights alone would be multiplied with scales of 1, which no forward pass
    without gradients ever mends (Transformer Engine 2.20, `autocast_exit`).
    """
    used = precision.named(formats_of(precision, parallel, device)[-1])
    return precision.named("bf16") if used.is_fp8 else used


def init_process_groups(parallel: ParallelConfig, device: str, seed: int) -> None:
    """Join torch's and Megatron-core's process groups, once per process.

    Under torchrun or srun the usual environment (RANK, WORLD_SIZE, MASTER_ADDR) is used; without it the process is alone.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel.deterministic:
        # Transformer Engine's switch (dot_product_attention), which Megatron-core's deterministic_mode asks for.
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    _, world_size = rank_and_processes()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            # Graph capture needs one stream, not the default one, from the model's construction on.
            torch.cuda.set_stream(torch.cuda.Stream())
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        timeout = timedelta(minutes=parallel.nccl_timeout_minutes)
        if world_size > 1:
            _join(lambda: dist.init_process_group(backend, timeout=timeout))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    model_parallel = parallel.tensor_parallel * parallel.context_parallel
    if dist.get_world_size() % model_parallel:
        raise UserError(
            "parallel",
            f"{dist.get_world_size()} processes with tensor_parallel={parallel.tensor_parallel} and "
            f"context_parallel={parallel.context_parallel}",
            f"a number of processes that {model_parallel} divides",
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_parallel,
            context_parallel_size=parallel.context_parallel,
            # Its groups have a timeout of their own.
            distributed_timeout_minutes=parallel.nccl_timeout_minutes,
        )
    torch.manual_seed(seed)
    # With the inference tracker Megatron-core's RNG forks are no-ops, as a CPU needs; there is no dropout to seed.
    on_cpu = device == "cpu"
    model_parallel_cuda_manual_seed(
        seed,
        te_rng_tracker=not on_cpu and te_version() is not None,
        inference_rng_tracker=on_cpu,
        use_cudagraphable_rng=not on_cpu,
        force_reset_rng=True,
    )


def _join(join: Callable[[], None]) -> None:
    """Meet the other ranks. A stop signal meanwhile ends the process, which has nothing to save; torch's own waiting hears none."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            join()
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, name="joining ranks", daemon=True)
    hears = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, _leave) for number in STOP_SIGNALS} if hears else {}
    thread.start()
    thread.join(QUIET_JOIN_SECONDS)
    if thread.is_alive():
        rank, processes = rank_and_processes()
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        logger.warning(
            "rank %d waits at %s for all of %d ranks (RANK, WORLD_SIZE, MASTER_ADDR)", rank, place, processes
        )
    while thread.is_alive():
        thread.join(SIGNAL_SECONDS)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if failed:
        raise failed[0]


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def leave_process_groups() -> None:
    """Part from the other ranks in good order, where they were joined. The process builds no model after that."""
    if dist.is_initialized():
        dist.destroy_process_group()
