"""What tests read of a small run: its newest checkpoint, its records, and whether it is the same as another."""

import json
import re
from collections.abc import Callable

import numpy as np

from yxanul_nemo.checkpoint.committed import Checkpoint
from yxanul_nemo.checkpoint.ledger import Ledger
from yxanul_nemo.checkpoint.store import CheckpointStore
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases
from yxanul_nemo.validation.record import phase_result_path

PHASES = (1, 2, 3)
TOTAL = 18432
STEPS = 22
WEIGHTS = "rank_00000.safetensors"

PROSE_ALONE = ("~validation.domains.code", "~validation.domains.reference")
"""For GPU machines, whose installed packages may not make held-out text of every kind."""

MakeRun = Callable[..., RunConfig]


def newest(config: RunConfig) -> Checkpoint:
    return CheckpointStore(config.run.dir / "checkpoints").list()[-1]


def ledger(config: RunConfig) -> Ledger:
    return newest(config).read_ledger()


def state(config: RunConfig) -> tuple[bytes, str]:
    """All tensors of the newest checkpoint, weights and optimizer, and its ledger."""
    path = newest(config).path
    files = sorted(path.glob("rank_*.safetensors"))
    return b"".join(file.read_bytes() for file in files), (path / "ledger.json").read_text()


def lines(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


def records(config: RunConfig) -> list[dict]:
    """Without those of single skipped updates."""
    return [line for line in lines(config) if "steps" in line]


def skipped(config: RunConfig) -> list[tuple[int, int, int]]:
    """Phase, step in it and tokens of the run of each skipped update."""
    found = [line for line in lines(config) if "skipped_step_in_phase" in line]
    return [(line["skipped_phase"], line["skipped_step_in_phase"], line["tokens_total"]) for line in found]


def assert_equal_runs(config: RunConfig, straight: RunConfig) -> None:
    """Same tokens, same bits, same validation, and records about each step once."""
    assert newest(config).tokens == newest(straight).tokens == TOTAL
    (tensors, text), (expected_tensors, expected_text) = state(config), state(straight)
    assert text == expected_text
    assert tensors == expected_tensors
    for number in PHASES:
        results = [json.loads(phase_result_path(run.run.dir, number).read_text()) for run in (config, straight)]
        assert results[0]["domains"] == results[1]["domains"]
    best = [json.loads((run.run.dir / "checkpoints" / "best").read_text()) for run in (config, straight)]
    assert best[0]["checkpoint"] == best[1]["checkpoint"]
    assert_records_cover_each_step(config)


def assert_records_cover_each_step(config: RunConfig) -> None:
    seen = records(config)
    assert sum(record["steps"] for record in seen) == STEPS
    totals = [record["tokens_total"] for record in seen]
    assert totals == sorted(set(totals)) and totals[-1] == TOTAL
    tokens_per_step = {phase.number: phase.tokens_per_step for phase in plan_phases(config.curriculum)}
    assert np.diff([0, *totals]).tolist() == [r["steps"] * tokens_per_step[r["phase"]] for r in seen]


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text, re.DOTALL), text
