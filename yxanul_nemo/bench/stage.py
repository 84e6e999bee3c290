"""`stage=bench`: time every case; `figures` keeps and shows what was measured.

Several processes take part if torchrun starts them: `torchrun --nproc-per-node=2 launcher.py stage=bench`.
"""

import logging
import time
from typing import Any

import numpy as np
import torch

from data_prep.corpus.manifest import MANIFEST_NAME, load_manifest
from yxanul_nemo.bench.cases import Case, Shape, bench_sweeps, distinct_cases
from yxanul_nemo.bench.figures import curriculum_speeds, show, write_chart, write_figures
from yxanul_nemo.bench.measure import measure
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.curriculum.phases import source_sizes
from yxanul_nemo.data.blend import normalized_shares
from yxanul_nemo.data.windows import PhaseWindows, Reading, corpus_shards, open_sources
from yxanul_nemo.errors import UserError
from yxanul_nemo.log import logger
from yxanul_nemo.machine.environment import describe_environment
from yxanul_nemo.machine.gpus import rank_and_processes
from yxanul_nemo.machine.runtime import formats_of, resolve_device
from yxanul_nemo.model.counts import training_flops_per_token
from yxanul_nemo.model.memory import MEASURED_VOCAB_SIZE, with_micro_batch
from yxanul_nemo.training.micro_batch import gpu_memory_bytes
from yxanul_nemo.training.records import peak_flops_per_second

RANDOM_DOCUMENT_TOKENS = 588
"""Mean length of a document of random tokens: that of the documentation corpus in BENCHMARKS.md, in tokens of the 200,005."""

RANDOM_TOKENS = 1 << 24
"""Random tokens, over which a case begins again."""
READABLE_TOKENS = 1_000_000_000
"""Tokens that a case could read, over as many epochs as that takes."""


def run_bench_stage(config: RunConfig) -> bool:
    """Measure all cases; False if one of them could not run."""
    device = resolve_device(config.parallel)
    corpus = Corpus(config)
    config = with_micro_batch(config, corpus.vocab_size, gpu_memory_bytes(device))
    rank, processes = rank_and_processes()
    if rank:
        logger.setLevel(logging.WARNING)
    model_ranks = config.parallel.tensor_parallel * config.parallel.context_parallel
    data_parallel = max(1, processes // model_ranks)
    formats = formats_of(config.precision, config.parallel, device)
    sweeps = bench_sweeps(config, formats, data_parallel)
    cases = distinct_cases(sweeps)
    over = "inside documents" if config.data.document_mask else "over whole windows"
    on = f"{processes} x {_device_name(device)}"
    logger.info("%d cases on %s, attention %s, data: %s", len(cases), on, over, corpus.description)
    peak = peak_flops_per_second(PrecisionConfig(name="bf16"), device, devices=processes)
    figures: dict[str, Any] = {
        "environment": describe_environment(),
        "device": _device_name(device),
        "processes": processes,
        "parallel": config.parallel.model_dump(),
        "peak_bf16_flops_per_second": peak,
        "model": config.model.name,
        "vocab_size": corpus.vocab_size,
        "data": corpus.description,
        "document_mask": config.data.document_mask,
        "timed_steps": config.bench.steps,
        "cases": [],
    }
    # Written after every case, so that a run that is cut short keeps what it has measured.
    path = config.run.folder.bench / time.strftime("bench-%Y%m%d-%H%M%S.json")
    rates: dict[Shape, float] = {}
    for case in cases:
        row = _describe(case) | _run(config, case, corpus, device, peak)
        figures["cases"].append(row)
        if "error" not in row:
            rates[case.shape] = row["tokens_per_second"]
        _log(case, row)
        if rank == 0:
            write_figures(path, figures)
    if rank == 0:
        if config.bench.seq_len is None:
            figures["curriculum"] = curriculum_speeds(sweeps, rates)
        write_figures(path, figures)
        write_chart(path.with_suffix(".png"), figures)
        show(path, figures, config.curriculum.name)
    return len(rates) == len(cases)


class Corpus:
    """Where the steps' tokens come from: the run's prepared corpus, or random ones where there is none."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.vocab_size = MEASURED_VOCAB_SIZE if config.tokenizer.vocab_size is None else config.tokenizer.vocab_size
        self.eos_id = 0
        self.description = (
            f"random tokens of {self.vocab_size:,} in documents of {RANDOM_DOCUMENT_TOKENS} on average (no corpus is prepared in "
            f"{config.data_dir})"
        )
        self._shards: dict[str, Any] = {"random": [RandomTokens(self.vocab_size, self.eos_id, config.data.seed)]}
        self._shares = np.ones(1)
        if (config.data_dir / MANIFEST_NAME).is_file():
            manifest = load_manifest(config.data_dir)
            names = config.data.source_names
            sizes = source_sizes(config, manifest)
            self._shards = corpus_shards(config, manifest)
            self._shares = normalized_shares(names, config.curriculum.blend, sizes)
            self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
            self.description = f"the corpus in {config.data_dir}"

    def windows(self, seq_len: int) -> PhaseWindows:
        """Windows from the beginning of each source."""
        data, readings = self.config.data, [Reading(0, READABLE_TOKENS // seq_len, self._shares)]
        sources = open_sources(self._shards, data.seed, max(data.chunk_tokens, seq_len))
        return PhaseWindows(sources, [0] * len(sources), seq_len, readings, data.shuffle_tokens)


class RandomTokens:
    """A shard of uniform random tokens with EOS as often as documents end, as far as `ShuffledSource` reads one."""

    def __init__(self, vocab_size: int, eos_id: int, seed: int):
        random = np.random.default_rng(seed)
        self.tokens = random.integers(0, vocab_size, RANDOM_TOKENS, dtype=np.int32)
        self.tokens[random.random(RANDOM_TOKENS) < 1 / RANDOM_DOCUMENT_TOKENS] = eos_id

    def will_need(self, first_token: int, end_token: int) -> None:
        """Do nothing: the tokens are in memory."""


def _run(config: RunConfig, case: Case, corpus: Corpus, device: str, peak: float | None) -> dict[str, Any]:
    try:
        result = measure(config, case, corpus.windows(case.phase.seq_len), corpus.vocab_size, corpus.eos_id, device)
    except UserError as error:
        return {"error": str(error)}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    rate = case.phase.tokens_per_step / result.median_seconds
    flops = training_flops_per_token(config.model, corpus.vocab_size, case.phase.seq_len)
    return {
        "tokens_per_second": rate,
        "step_seconds_median": result.median_seconds,
        "step_seconds_spread": result.spread,
        "model_flops_per_second": rate * flops,
        "mfu": rate * flops / peak if peak else None,
        "peak_memory_bytes": result.peak_memory_bytes,
        "power_watts": result.power_watts,
        "data_wait_share": result.data_wait_share,
        "setup_seconds": result.setup_seconds,
        "cuda_graph": result.uses_graph,
        "loss_nats_per_token": result.loss_nats_per_token,
        "kernels": result.kernels and [{"name": n, "seconds": s, "launches": c} for n, s, c in result.kernels],
    }


def _describe(case: Case) -> dict[str, Any]:
    return {
        "precision": case.precision.name,
        "seq_len": case.phase.seq_len,
        "tokens_per_step": case.phase.tokens_per_step,
        "micro_batch_size": case.micro_batch_size,
        "accumulation": case.accumulation,
    }


def _log(case: Case, row: dict[str, Any]) -> None:
    if "error" in row:
        logger.info("%s: %s", case.name, row["error"])
    else:
        logger.info("%s: %s tokens/s", case.name, f"{row['tokens_per_second']:,.0f}")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
