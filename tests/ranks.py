"""Functions run in fresh processes, alone or as ranks of a process group; the heavy imports happen once, in a fork server."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Megatron-core asks for GPUs as it is imported; asked through the driver, a fork server could not be forked for work on a GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["yxanul_nemo.training.loop"])


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: object, on_gpus: bool = False) -> list[Any]:
    """Results of `function(*arguments)` on each of `ranks` processes of one group; an exception in one fails the test.

    Args:
        on_gpus: start processes from nothing, because the driver does not survive a fork.
    """
    context = multiprocessing.get_context("spawn") if on_gpus else CONTEXT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, pipes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        process = context.Process(target=_rank, args=(environment, sender, function, arguments))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    results = []
    for process, pipe in zip(processes, pipes, strict=True):
        try:
            kind, value = pipe.recv()
        except EOFError:
            kind, value = "error", f"ended with exit code {process.exitcode}"
        if kind == "error":
            for other in processes:
                other.kill()
            raise AssertionError(value)
        results.append(value)
    for process in processes:
        process.join()
    return results


def _rank(environment: dict[str, object], pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("result", function(*arguments)))
    except BaseException:  # noqa: BLE001 - whatever it was, the test that asked for it must see it
        pipe.send(("error", traceback.format_exc()))
    pipe.close()
