"""What two GPUs of one machine do together: tokens/s of the training step on one and on two, and what the plan would have said.

    python -m benchmarks.two_gpus --output two_gpus.json

The 197M model in FP8 on random tokens. One GPU is measured first, lengths spread over both; then both GPUs in each layout, in one pair of
processes, so that what is imported and compiled serves all of them. Steps have `--tokens-per-step` tokens in all layouts but `data,
twice the step`, where each GPU has as many as one GPU alone. `predicted` is `stage=plan`'s simulation from the measured speed of one
GPU and the link speeds of `plan`; `sent` is the time of NCCL's kernels in one step, in which a rank also waits for the other.
A layout that fails or takes too long is a line in the table or lacks one; figures so far are kept.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SEQ_LENS = (2048, 512, 64)
RECIPE = "recipe=yxanul_197m_fixed_2048"
"""Its one length is replaced; an FP8 recipe of the model."""
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[int, ...], int]] = {
    "data": ((), SEQ_LENS, 1),
    "data, optimizer not shared": (("parallel.distributed_optimizer=false",), (2048,), 1),
    "data, twice the step": ((), (2048,), 2),
    "tensor": (("parallel.tensor_parallel=2",), (2048,), 1),
    "context": (("parallel.context_parallel=2",), (2048,), 1),
}
"""Name -> overrides, lengths, factor on the tokens of a step. Those that are least sure to run come last."""
MODULE = "benchmarks.two_gpus"


def main(arguments: list[str]) -> int:
    """Measure in other processes, show a table; 1 if anything could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="figures as JSON")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="(default: all)")
    parser.add_argument("--tokens-per-step", type=int, default=81_920, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed for each case (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="of the configuration, as model=yxanul_270m")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.measure:
        measure_layouts(options)
        return 0
    deadline = time.monotonic() + options.timeout
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.with_suffix(".jsonl")
    lines.unlink(missing_ok=True)
    shared = ["--output", str(options.output), "--tokens-per-step", str(options.tokens_per_step)]
    shared += ["--steps", str(options.steps), *options.overrides]
    single = [sys.executable, "-m", MODULE, *shared, "--measure"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", MODULE]
    alone = [
        subprocess.Popen(
            [*single, f"one:{','.join(map(str, seq_lens))}"], env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        )
        for gpu, seq_lens in (("0", SEQ_LENS[:1]), ("1", SEQ_LENS[1:]))
    ]
    for process in alone:
        wait(process, deadline)
    wait(subprocess.Popen([*torchrun, *shared, "--measure", *options.layouts]), deadline)
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    complete(rows)
    options.output.write_text(json.dumps({"environment": environment(), "cases": rows}, indent=2) + "\n")
    Console(width=160, highlight=False).print(table(rows))
    wanted = len(SEQ_LENS) + sum(len(LAYOUTS[name][1]) for name in options.layouts)
    return 0 if sum("error" not in row for row in rows) == wanted else 1


def wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Until it ends or there is no time left."""
    try:
        process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"{process.args!r}: no time left", file=sys.stderr)
        # torchrun passes this on to its ranks.
        process.terminate()
        process.wait()


def measure_layouts(options: argparse.Namespace) -> None:
    """In a process that measures: `one:LENGTHS`, or layouts as one of two ranks. The first rank appends a line for each case."""
    from megatron.core import parallel_state

    from yxanul_nemo.bench.cases import bench_cases
    from yxanul_nemo.bench.measure import measure
    from yxanul_nemo.bench.stage import Corpus
    from yxanul_nemo.config.load import compose, parse
    from yxanul_nemo.log import configure_logging
    from yxanul_nemo.machine.gpus import rank_and_processes
    from yxanul_nemo.machine.runtime import formats_of, leave_process_groups, resolve_device

    configure_logging()
    rank, processes = rank_and_processes()
    for asked in options.measure:
        name, _, seq_lens = asked.partition(":")
        overrides, lengths, factor = ((), tuple(map(int, seq_lens.split(","))), 1) if seq_lens else LAYOUTS[name]
        for seq_len in lengths:
            asked_for = [f"bench.seq_len=[{seq_len}]", f"bench.tokens_per_step={factor * options.tokens_per_step}"]
            asked_for += [f"bench.steps={options.steps}", "bench.warmup_steps=3", "bench.profile=true"]
            settings = [RECIPE, "parallel.micro_batch_tokens=65536", *asked_for, *overrides, *options.overrides]
            config = parse(compose(settings))
            data_ranks = processes // (config.parallel.tensor_parallel * config.parallel.context_parallel)
            corpus, device = Corpus(config), resolve_device(config.parallel)
            (case,) = bench_cases(config, formats_of(config.precision, config.parallel, device)[:1], data_ranks)
            row: dict[str, Any] = {"layout": name, "gpus": processes, "seq_len": seq_len, "settings": settings}
            row |= {"tokens_per_step": case.phase.tokens_per_step, "accumulation": case.accumulation}
            row |= {"micro_batch_tokens": case.micro_batch_tokens}
            try:
                result = measure(config, case, corpus.windows(seq_len), corpus.vocab_size, corpus.eos_id, device)
            except Exception as error:  # noqa: BLE001 - the other layouts may still run
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                sent = [seconds for kernel, seconds, _ in result.kernels or () if "nccl" in kernel.lower()]
                row |= {
                    "tokens_per_second": case.phase.tokens_per_step / result.median_seconds,
                    "step_seconds_median": result.median_seconds,
                    "step_seconds_spread": result.spread,
                    "sent_seconds": sum(sent),
                    "peak_memory_bytes": result.peak_memory_bytes,
                    "cuda_graph": result.uses_graph,
                    "setup_seconds": result.setup_seconds,
                    "loss_nats_per_token": result.loss_nats_per_token,
                }
            if rank == 0:
                with open(options.output.with_suffix(".jsonl"), "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps({key: value for key, value in row.items() if key != "settings"}), flush=True)
            # The next case may have another layout.
            parallel_state.destroy_model_parallel()
    leave_process_groups()


def complete(rows: list[dict[str, Any]]) -> None:
    """Add the ratio to one GPU at the same length, and the simulation's tokens/s; cases of layouts that are gone stay as they are."""
    from yxanul_nemo.config.load import compose, parse
    from yxanul_nemo.model.memory import MEASURED_VOCAB_SIZE
    from yxanul_nemo.plan.scaling import Simulator

    alone = {row["seq_len"]: row["tokens_per_second"] for row in rows if row["gpus"] == 1 and "error" not in row}
    for row in rows:
        if row["gpus"] == 1 or row["seq_len"] not in alone or row["layout"] not in LAYOUTS:
            continue
        one = alone[row["seq_len"]]
        simulator = Simulator(parse(compose(row["settings"])), lambda *_, rate=one: rate, MEASURED_VOCAB_SIZE)
        step = simulator.step(row["seq_len"], row["micro_batch_tokens"], row["accumulation"], row["gpus"])
        row["predicted_tokens_per_second"] = row["tokens_per_step"] / step.seconds
        row["predicted_sent_seconds"] = step.communication_seconds
        if "error" not in row:
            row["ratio_to_one_gpu"] = row["tokens_per_second"] / one


def table(rows: list[dict[str, Any]]) -> Table:
    """All figures."""
    shown = Table(title="training step on one and on two GPUs")
    columns = ("layout", "GPUs", "seq len", "tokens/step", "micro-batch", "tokens/s", "+-", "ratio", "predicted")
    for column in (*columns, "sent, ms", "predicted", "GiB", "graph", "loss"):
        shown.add_column(column, justify="left" if column == "layout" else "right")
    for row in rows:
        shape = f"{row['micro_batch_tokens']:,} x {row['accumulation']}"
        cells = [row["layout"], str(row["gpus"]), str(row["seq_len"]), f"{row['tokens_per_step']:,}", shape]
        if "error" in row:
            shown.add_row(*cells, row["error"])
            continue
        shown.add_row(
            *cells,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_seconds_spread']:.1%}",
            f"{row['ratio_to_one_gpu']:.2f}" if "ratio_to_one_gpu" in row else "-",
            f"{row['predicted_tokens_per_second']:,.0f}" if "predicted_tokens_per_second" in row else "-",
            f"{row['sent_seconds'] * 1e3:.1f}",
            f"{row['predicted_sent_seconds'] * 1e3:.1f}" if "predicted_sent_seconds" in row else "-",
            f"{(row['peak_memory_bytes'] or 0) / 2**30:.1f}",
            "yes" if row["cuda_graph"] else "no",
            f"{row['loss_nats_per_token']:.3f}",
        )
    return shown


def environment() -> dict[str, Any]:
    """Commit, versions and hardware."""
    from yxanul_nemo.machine.environment import describe_environment

    return describe_environment()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
