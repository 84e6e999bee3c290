"""What a plan says of learning rates, warm-ups and lengths of run that were not measured."""

from pathlib import Path

import pytest

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.plan.plan import make_plan

ONE_PHASE = ("recipe=yxanul_197m_fixed_2048", "plan.gpus=1", "curriculum.phases.0.tokens_per_step=65536")
MEASURED = (*ONE_PHASE, "curriculum.phases.0.tokens=100e6")
MUON = ("optim=muon", "optim.lr=2.4e-3", "optim.warmup_tokens=0.1")
ADAMW = ("optim.lr=1.2e-3", "optim.warmup_tokens=0.1")


def rate_notes(tmp_path: Path, *overrides: str) -> str:
    """Return what the plan says about learning rate and warm-up."""
    warnings = make_plan(parse(compose([f"run.dir={tmp_path}", *overrides])), []).warnings
    return "\n".join(warning for warning in warnings if "measured" in warning or "warm-up" in warning)


@pytest.mark.parametrize(
    "measured",
    [MUON, (*MUON, "optim.warmup_tokens=0.03"), ADAMW],
    ids=["muon", "muon with the shorter warm-up", "adamw"],
)
def test_what_was_measured_gets_no_note(tmp_path: Path, measured: tuple[str, ...]) -> None:
    notes = rate_notes(tmp_path, *MEASURED, *measured)
    assert "optim." not in notes and "learning rates were" not in notes


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ((*MUON, "optim.lr=0.02"), ["optim.lr=0.02", "0.0024", "Muon"]),
        ((*ADAMW, "optim.lr=1e-4"), ["optim.lr=0.0001", "0.0012", "AdamW"]),
        # A phase's factor counts: 2.4e-3 times 5.
        ((*MUON, "curriculum.phases.0.lr_scale=5"), ["0.012"]),
        # 1% of 1,526 steps.
        ((*ADAMW, "optim.warmup_tokens=0.01"), ["optim.warmup_tokens=0.01", "15 steps"]),
        # The same length in tokens.
        ((*ADAMW, "optim.warmup_tokens=1e6"), ["15 steps"]),
        ((*MUON, "curriculum.phases.0.tokens=8e9"), ["8,000 M tokens", "not known"]),
        ((*MUON, "curriculum.phases.0.tokens_per_step=1048576"), ["1,048,576"]),
    ],
)
def test_what_is_far_from_it_is_named(tmp_path: Path, overrides: tuple[str, ...], named: list[str]) -> None:
    notes = rate_notes(tmp_path, *MEASURED, *overrides)
    for part in named:
        assert part in notes


def test_models_of_other_sizes_get_no_note(tmp_path: Path) -> None:
    assert "optim.lr" not in rate_notes(tmp_path, "recipe=demo", "optim.lr=0.5")
