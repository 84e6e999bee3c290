"""`benchmarks.two_gpus` with a small model on a CPU: one process, then the simulation beside made-up figures of two."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import two_gpus
from tests.ranks import run_ranks

SMALL = (
    "model=demo", "model.max_position_embeddings=2048", "precision=fp32", "parallel.device=cpu", "+tokenizer.vocab_size=700",
    "parallel.micro_batch_tokens=2048", "plan.gpu=h100",
)  # fmt: skip


def measure_one(output: Path) -> None:
    options = Namespace(measure=["one:16"], output=output, tokens_per_step=256, steps=2, overrides=SMALL)
    two_gpus.measure_layouts(options)


def test_a_case_is_measured_and_predicted(tmp_path: Path) -> None:
    run_ranks(measure_one, 1, tmp_path / "figures.json")
    (row,) = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    assert "error" not in row, row
    assert row["tokens_per_second"] > 0 and row["tokens_per_step"] == 256 and not row["cuda_graph"]
    rows = [row, row | {"layout": "data", "gpus": 2, "tokens_per_second": 1.5 * row["tokens_per_second"]}]
    two_gpus.complete(rows)
    assert rows[1]["ratio_to_one_gpu"] == pytest.approx(1.5)
    assert 0 < rows[1]["predicted_tokens_per_second"] < 2 * row["tokens_per_second"]
    two_gpus.table(rows)
