"""Whole runs, on a GPU where there is one: killed, stopped and resumed they end with the bits of the undisturbed one."""

import signal
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import sessions
from tests.training.runs import PHASES, PROSE_ALONE, TOTAL, MakeRun, assert_equal_runs, newest
from yxanul_nemo.config.run import RunConfig

ON_GPU = ("parallel.device=cuda",)
CUDNN = ("parallel.tiled_attention=false", "parallel.deterministic=true")
SHAPE = (
    "model.hidden_size=256", "model.ffn_hidden_size=512", "model.head_dim=64",
    "model.embedding_rank=128", "model.max_position_embeddings=256", "curriculum.phases.2.seq_len=256", "validation.eval_len=128",
)  # fmt: skip
"""Windows of 16, 64 and 256 tokens: both kinds of the project's attention, or one of them and cuDNN's."""


CASES = [
    pytest.param(1, ("precision=fp32",), id="cpu"),
    pytest.param(2, ("precision=fp32", "optim=muon", "parallel.processes_per_node=2"), id="cpu-muon-2"),
    *(
        pytest.param(1, (f"precision={name}", *ON_GPU, f"optim={optim}"), id=f"{name}-{optim}", marks=pytest.mark.gpu)
        for name in ("bf16", "fp8_hybrid")
        for optim in ("adamw", "muon")
    ),
    pytest.param(1, ("precision=fp8_hybrid", *ON_GPU, *CUDNN), id="fp8_hybrid-cudnn", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("ranks", "settings"), CASES)
def test_kills_and_stops_change_no_bit(
    make_run: MakeRun, tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    """A signal at the end of a phase and one inside another, and kills without warning inside a step and a save."""
    if "parallel.device=cuda" in settings and CUDNN[1] not in settings and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("attention by tiles is for Hopper, and other GPUs need parallel.deterministic")
    make = lambda: make_run(*settings, *SHAPE, *PROSE_ALONE)  # noqa: E731
    straight, disturbed = make(), make()
    run_ranks(sessions.train, ranks, straight, PHASES)
    for tokens, work, killed_at in ((4096, "step", 6144), (13312, "save", 15360)):
        run_ranks(sessions.train_until, ranks, disturbed, PHASES, tokens, signal.SIGTERM)
        assert newest(disturbed).tokens == tokens
        _kill(ranks, disturbed, work, killed_at, tmp_path / work)
    run_ranks(sessions.train, ranks, disturbed, PHASES)
    assert newest(disturbed).tokens == TOTAL
    assert_equal_runs(disturbed, straight)


def _kill(ranks: int, config: RunConfig, work: str, tokens: int, note: Path) -> None:
    """Before the third line of the work that leads to `tokens`."""
    with pytest.raises(AssertionError, match="ended with exit code"):
        run_ranks(sessions.train_and_die, ranks, config, PHASES, work, tokens, 3, note)
    assert note.is_file(), "it ended for another reason"
