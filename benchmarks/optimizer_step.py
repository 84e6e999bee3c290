"""The update alone, of the 197M model on one GPU: gradient norm, clipping, AdamW or Muon, BF16 copies of the weights, in a CUDA graph.

    python -m benchmarks.optimizer_step [--recipe yxanul_197m_h100] [--output FILE.json]

Gradients are random numbers; the time does not depend on them. Beside the milliseconds stands the memory of the optimizer's state, and what
the update needs besides while it runs, which in training it shares with the activations.
"""

import argparse
import gc
import itertools
import statistics
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from rich.console import Console
from rich.table import Table

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.figures import GIB
from yxanul_nemo.files import write_json_atomic
from yxanul_nemo.machine.environment import describe_environment
from yxanul_nemo.machine.runtime import init_process_groups
from yxanul_nemo.model.build import build_model
from yxanul_nemo.training.optimizer import MainParamOptimizer

VOCAB_SIZE = 200_005
WARMUP, TIMED = 3, 20
VARIANTS = {
    "AdamW": ("optim=adamw",),
    "Muon": ("optim=muon", "optim.muon.neuron_norm=false", "optim.muon.cautious_decay=false"),
    "Muon, cautious decay": ("optim=muon", "optim.muon.neuron_norm=false"),
    "Muon, neuron norm": ("optim=muon", "optim.muon.cautious_decay=false"),
    "Muon, both (optim=muon)": ("optim=muon",),
}


def measure(recipe: str, overrides: tuple[str, ...]) -> dict[str, float]:
    """Median time of an update and its memory."""
    gc.collect()
    torch.cuda.empty_cache()
    config = parse(compose([f"recipe={recipe}", "precision=bf16", "parallel.device=cuda", *overrides]))
    init_process_groups(config.parallel, "cuda", seed=1)
    model = build_model(config.model, VOCAB_SIZE, config.precision, config.parallel, seed=1, drawn=False)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0.0, 0.02)
    before = torch.cuda.memory_allocated()
    optimizer = MainParamOptimizer(
        model,
        config.optim,
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        True,
        parallel_state.get_tensor_model_parallel_group(),
    )
    state_bytes = torch.cuda.memory_allocated() - before
    for part in optimizer.flat.parts:
        part.grad.normal_(0.0, 1e-4)
    optimizer.set_rates(1e-3, 1.0)
    update = partial(optimizer.update, torch.isfinite)
    for _ in range(WARMUP):
        update()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        results = update()
    working_bytes = torch.cuda.max_memory_allocated() - held
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    assert bool(results[1]), "the update was not applied"
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return {
        "milliseconds": statistics.median(times),
        "state_bytes": state_bytes,
        "working_bytes": working_bytes,
    }


def main() -> None:
    """Measure all variants and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="yxanul_197m_h100")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    rows = {}
    table = Table("optimizer", "ms", "state GiB", "besides GiB")
    for name, overrides in VARIANTS.items():
        rows[name] = found = measure(arguments.recipe, overrides)
        figures = found["milliseconds"], found["state_bytes"] / GIB, found["working_bytes"] / GIB
        table.add_row(name, *(f"{x:.2f}" for x in figures))
        if arguments.output:
            report = {"environment": describe_environment(), "gpu": torch.cuda.get_device_name(), "optimizers": rows}
            write_json_atomic(arguments.output, report)
    Console(width=120).print(torch.cuda.get_device_name(), table)


if __name__ == "__main__":
    main()
