"""The product's losses beside those of an independent model and loop in plain torch, from the same weights on the same windows."""

import shutil
from pathlib import Path

from tests.ranks import run_ranks
from tests.training.runs import MakeRun
from yxanul_nemo.config.run import RunConfig

STEPS = 20


def rows_of(config: RunConfig, micro_batch_tokens: int) -> list[dict[str, float]]:
    from benchmarks.same_losses import losses_of_both

    return losses_of_both(config, STEPS, "fp32", micro_batch_tokens, lambda row: None)


def test_the_product_trains_as_plain_torch_does(prepared: Path, make_config: MakeRun, tmp_path: Path) -> None:
    """Clipped steps, accumulated by both in parts of their own, with a rate that rises and falls."""
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, tmp_path / part)
    config = make_config(
        f"run.dir={tmp_path}",
        "parallel.micro_batch_tokens=512",
        "validation.eval_len=16",
        "curriculum.phases.0.tokens=24576",
        "curriculum.phases.0.tokens_per_step=1024",
        "curriculum.phases.0.grad_clip=0.1",
        "optim=adamw",
        "optim.lr=5e-3",
        "optim.warmup_tokens=8000",
    )
    (rows,) = run_ranks(rows_of, 1, config, 300)
    assert len(rows) == STEPS and rows[-1]["product_loss"] < rows[0]["product_loss"] - 0.1
    rates = [row["learning_rate"] for row in rows]
    assert rates[0] < rates[5] > rates[-1] and all(row["product_norm"] > 0.1 for row in rows)
    for row in rows:
        assert abs(row["product_loss"] - row["plain_loss"]) < 1e-5
        assert abs(row["product_norm"] - row["plain_norm"]) < 1e-3 * row["plain_norm"]
