"""`precision=auto`: what a phase may be trained in, which of two formats is taken, and whole phases that keep what was chosen."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training import sessions
from tests.training.runs import PHASES, PROSE_ALONE, MakeRun, assert_records_cover_each_step, ledger, newest, state
from yxanul_nemo.bench.cases import bench_cases
from yxanul_nemo.checkpoint.identity import phase_plan
from yxanul_nemo.checkpoint.ledger import PhaseRecord
from yxanul_nemo.checkpoint.shards import ShardReader
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.training import PrecisionConfig
from yxanul_nemo.curriculum.phases import Phase, plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.check import check_machine
from yxanul_nemo.machine.gpu_table import BY_KEY
from yxanul_nemo.machine.runtime import outside_training
from yxanul_nemo.plan.plan import make_plan
from yxanul_nemo.training import precision_choice
from yxanul_nemo.training.precision_choice import formats_for, pick_faster_format

RECIPE = ("recipe=yxanul_197m_h100", "parallel.micro_batch_tokens=32768")
BOTH = ("fp8_hybrid", "bf16")
GPU_SHAPE = (
    "precision=auto", "parallel.device=cuda", "model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4",
    "model.kv_groups=2", "model.head_dim=64", "model.embedding_rank=128",
)  # fmt: skip


def auto(*overrides: str) -> RunConfig:
    return parse(compose([*RECIPE, "precision=auto", *overrides]))


@pytest.fixture
def fp8_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has both formats, as far as the choice asks it."""
    monkeypatch.setattr(precision_choice, "formats_of", lambda precision, parallel, device: BOTH)


def begun(phase: Phase, precision: str | None) -> PhaseRecord:
    return PhaseRecord(**dict(phase_plan(phase)), index=1, micro_batch_size=1, world_size=1, precision=precision)


def test_a_phase_under_way_keeps_its_format_where_the_machine_has_it(fp8_machine: None) -> None:
    config = auto()
    phase = plan_phases(config.curriculum)[0]
    assert formats_for(config, phase, None, 1, "cuda") == BOTH
    assert formats_for(config, phase, begun(phase, None), 1, "cuda") == BOTH
    assert formats_for(config, phase, begun(phase, "bf16"), 1, "cuda") == ("bf16",)
    assert formats_for(config, phase, begun(phase, "fp8_hybrid"), 1, "cuda") == ("fp8_hybrid",)
    assert formats_for(config, phase, begun(phase, "fp32"), 1, "cuda") == BOTH


def test_a_machine_without_the_recorded_format_uses_its_own() -> None:
    config = auto()
    phase = plan_phases(config.curriculum)[0]
    assert formats_for(config, phase, begun(phase, "fp8_hybrid"), 1, "cpu") == ("fp32",)
    assert outside_training(config.precision, config.parallel, "cpu").name == "fp32"


def test_a_model_outside_of_training_has_no_scales_and_is_not_in_fp8() -> None:
    config = parse(compose([*RECIPE, "precision=fp8_hybrid", "precision.bf16_first_tokens=4096"]))
    assert outside_training(config.precision, config.parallel, "cuda") == PrecisionConfig(name="bf16")


def test_shapes_that_fp8_cannot_multiply_are_bf16(fp8_machine: None) -> None:
    config = auto()
    phase = plan_phases(config.curriculum)[0]
    odd = replace(phase, seq_len=7, tokens_per_step=7 * 9)
    assert formats_for(config, odd, None, 1, "cuda") == ("bf16",)
    assert formats_for(auto("model.ffn_hidden_size=2056"), phase, None, 1, "cuda") == ("bf16",)
    with pytest.raises(UserError, match=r"model\.ffn_hidden_size=2056"):
        auto("model.ffn_hidden_size=2056", "precision=fp8_hybrid")


@pytest.mark.parametrize(
    ("seconds", "chosen"), [((1.0, 2.0), "fp8_hybrid"), ((2.0, 1.0), "bf16"), ((1.0, float("inf")), "fp8_hybrid")]
)
def test_the_faster_format_is_taken(seconds: tuple[float, float], chosen: str, log: pytest.LogCaptureFixture) -> None:
    assert pick_faster_format(BOTH, 4096, lambda in_bf16: seconds[in_bf16], lambda number: number, 3) == chosen
    assert f"phase 3 in {chosen}" in log.text and "4,096 tokens" in log.text


def test_the_slowest_rank_decides_on_all() -> None:
    """Here FP8 is the faster one, on another rank it is not."""
    others = iter([5.0, 3.0])
    slowest = lambda number: max(number, next(others))  # noqa: E731
    assert pick_faster_format(BOTH, 4096, lambda in_bf16: (1.0, 2.0)[in_bf16], slowest, 1) == "bf16"


def test_what_only_fp8_has_is_left_out_of_other_formats() -> None:
    precision = PrecisionConfig(name="auto", fp8_attention=True, bf16_first_tokens=4096)
    assert precision.named("fp8_hybrid") == PrecisionConfig(
        name="fp8_hybrid", fp8_attention=True, bf16_first_tokens=4096
    )
    assert precision.named("bf16") == PrecisionConfig(name="bf16")


def test_auto_on_a_cpu_is_fp32_and_stays_the_same_run(make_run: MakeRun, straight: RunConfig) -> None:
    """Its ledger tells it from a run that is configured for fp32; tokens, weights and what is recorded of phases are equal."""
    config = make_run("precision=auto")
    stopped = run_ranks(sessions.train_until, 1, config, PHASES, 7168, 15)[0]
    assert stopped == [True, False]
    assert run_ranks(sessions.train, 1, config, PHASES) == [[True, True]]
    assert state(config)[0] == state(straight)[0]
    assert_records_cover_each_step(config)
    found, expected = ledger(config), ledger(straight)
    assert [record.precision for record in found.phases] == ["fp32"] * 3
    assert found.phases == expected.phases and found.notes == ()
    assert found.config_fingerprint != expected.config_fingerprint


def test_a_ledger_notes_that_a_phase_goes_on_in_another_format(straight: RunConfig) -> None:
    before = ledger(straight)
    assert before.with_precision("fp32") is before
    after = before.with_precision("bf16")
    assert after.current.precision == "bf16"
    assert after.notes == (f"phase 3 at {before.tokens_total} tokens: precision fp32 -> bf16",)


@pytest.mark.parametrize(
    ("gpu", "overrides", "expected"),
    [
        ("h100", (), "fp8_hybrid"),
        ("a100", (), "bf16"),
        ("cpu", ("parallel.micro_batch_tokens=4096",), "fp32"),
        ("h100", ("model.ffn_hidden_size=2056",), "bf16"),
    ],
)
def test_a_plan_says_what_auto_is_expected_to_be(
    tmp_path: Path, gpu: str, overrides: tuple[str, ...], expected: str
) -> None:
    asked = [f"run.dir={tmp_path}", f"plan.gpu={gpu}", "plan.gpus=1"]
    plan = make_plan(auto(*asked, *overrides), [])
    assert plan.precision == f"auto, planned as {expected}"
    same = make_plan(parse(compose([*RECIPE, *asked, *overrides, f"precision={expected}"])), [])
    assert [p.tokens_per_second for p in plan.phases] == [p.tokens_per_second for p in same.phases]


def test_auto_is_planned_for_the_machine_at_hand(tmp_path: Path) -> None:
    config = auto(f"run.dir={tmp_path}", "plan.gpus=1", "plan.gpu=auto", "parallel.micro_batch_tokens=4096")
    assert make_plan(config, []).gpu == "CPU"
    assert make_plan(config, [BY_KEY["h200"].name]).precision == "auto, planned as fp8_hybrid"


def test_a_benchmark_measures_what_auto_chooses_from() -> None:
    names = {case.precision.name for case in bench_cases(auto("precision.bf16_first_tokens=4096"), BOTH)}
    assert names == set(BOTH)


def test_the_check_says_what_auto_comes_to(
    make_config: Callable[..., RunConfig], log: pytest.LogCaptureFixture
) -> None:
    assert check_machine(make_config("precision=auto"))
    assert "fp32 on cpu" in log.text and "this recipe can run here" in log.text


@pytest.mark.gpu
def test_phases_in_fp8_and_bf16_follow_one_another_and_a_resumed_one_keeps_its_format(make_run: MakeRun) -> None:
    """Both are measured in each phase; which one counts as the faster is the test's choice."""
    config = make_run(*GPU_SHAPE, *PROSE_ALONE)
    rounds = [(1, "fp8_hybrid", 0, 2), (2, "bf16", 7168, 2), (2, "fp8_hybrid", 0, 0), (3, "fp8_hybrid", 0, 2)]
    for phase, favoured, stop_at, measured in rounds:
        assert run_ranks(sessions.train_in_favoured, 1, config, [phase], favoured, stop_at) == [measured]
        has_scales = any(key.startswith("fp8.") for key in ShardReader(newest(config).path).keys())  # noqa: SIM118
        assert has_scales == (phase != 2)
    after = ledger(config)
    assert [record.precision for record in after.phases] == ["fp8_hybrid", "bf16", "fp8_hybrid"]
    assert after.notes == () and after.skipped_steps == 0
    assert_records_cover_each_step(config)
    scores = [json.loads((config.run.dir / "validation" / f"phase-0{n}.json").read_text()) for n in PHASES]
    values = [score["mean_bits_per_byte"] for score in scores]
    assert values[2] < values[0], "what was learned in one format is there in the other"
