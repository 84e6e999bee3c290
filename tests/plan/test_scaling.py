"""The simulation of more GPUs: against sums made by hand, against the plan for the GPUs themselves, and by its limits."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.two_gpus import LAYOUTS, complete
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.stages import PlanConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.curriculum.phases import batch_layout, plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.machine.gpu_table import BY_KEY
from yxanul_nemo.plan.estimates import forecast_speed
from yxanul_nemo.plan.links import Links
from yxanul_nemo.plan.plan import Plan, make_plan
from yxanul_nemo.plan.scaling import forced_tokens_per_step, gpu_counts
from yxanul_nemo.plan.scaling_table import print_scaling

H100 = ("recipe=yxanul_197m_h100", "curriculum=h100", "plan.gpu=h100")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
GRADIENTS_BYTES = 4 * 196_398_464


def plan_of(tmp_path: Path, *overrides: str) -> Plan:
    return make_plan(parse(compose([f"run.dir={tmp_path}", "plan.gpus=1", *H100, *overrides])), [])


def test_an_all_reduce_is_bytes_over_speeds_and_hops() -> None:
    links = Links.of(PlanConfig(link_efficiency=0.5, network_efficiency=0.5))
    assert links.all_reduce_seconds(1e9, 1) == 0
    # Two GPUs of a node: each sends half of the bytes twice at half of 450 GB/s, one hop each way.
    assert links.all_reduce_seconds(1e9, 2) == pytest.approx(1e9 / 225e9 + 2 * 4e-6)
    # Four nodes of eight: 7/8 twice inside, then 3/4 of an eighth twice at half of 50 GB/s; three and two hops each way.
    inside, between = 2 * 7 / 8 * 1e9 / 225e9 + 6 * 4e-6, 2 * 3 / 4 * 0.125e9 / 25e9 + 4 * 14e-6
    assert links.all_reduce_seconds(1e9, 32) == pytest.approx(inside + between)
    # The data ranks of tensor-parallel pairs: four in each node.
    assert links.all_reduce_seconds(1e9, 8, stride=2) == pytest.approx(
        2 * 3 / 4 * 1e9 / 225e9 + 4 * 4e-6 + 2 * 1 / 2 * 0.25e9 / 25e9 + 2 * 14e-6
    )


def test_one_gpu_is_the_plan_for_one_and_eight_are_the_plan_for_eight(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "plan.scale_to=8")
    assert [run.gpus for run in plan.scaling] == [1, 2, 4, 8]
    one, eight = plan.scaling[0], plan.scaling[-1]
    assert one.total_seconds == pytest.approx(plan.total_seconds)
    assert one.efficiency == pytest.approx(1) and one.communication_share == 0
    of_eight = plan_of(tmp_path, "plan.gpus=8")
    assert eight.total_seconds == pytest.approx(of_eight.total_seconds)
    assert eight.gpu_hours == pytest.approx(of_eight.total_gpu_hours)
    assert eight.efficiency == pytest.approx(plan.total_seconds / 8 / of_eight.total_seconds)
    for simulated, planned in zip(eight.phases, of_eight.phases, strict=True):
        assert simulated.step_seconds == pytest.approx(planned.tokens_per_step / planned.tokens_per_second)
    assert json.loads(json.dumps(plan.to_json()))["scaling"][-1]["gpus"] == 8


@pytest.mark.parametrize(("shared", "gradients_sent"), [("false", 1.0), ("auto", 0.75)])
def test_a_step_is_computing_and_what_ranks_send_after_it(tmp_path: Path, shared: str, gradients_sent: float) -> None:
    overrides = (
        f"parallel.distributed_optimizer={shared}",
        "recipe=yxanul_197m_fixed_2048",
        "curriculum=fixed_2048",
        "precision=fp8_hybrid",
        "parallel.micro_batch_tokens=32768",
        "plan.gpu=h100",
    )
    plan = plan_of(tmp_path, *overrides, "curriculum.phases.0.tokens_per_step=131072", "plan.scale_to=2")
    (phase,) = plan.scaling[1].phases
    fp8, model = PrecisionConfig(name="fp8_hybrid"), parse(compose(["model=yxanul_197m"])).model

    def seconds(accumulation: int) -> float:
        step = 2048, 32_768, accumulation
        one = forecast_speed(model, 200_005, fp8, ParallelConfig(), BY_KEY["h100"], *step)
        return accumulation * 32_768 / one.tokens_per_second

    # Two micro-batches for each rank, four for one GPU alone.
    # All-reduced, or scattered and then gathered with half the bytes: each way half of them leave a GPU.
    computing, reduction = seconds(2), gradients_sent * GRADIENTS_BYTES / 252e9 + 8e-6
    assert phase.step_seconds == pytest.approx(computing + reduction, rel=1e-3)
    assert phase.communication_share == pytest.approx(reduction / (computing + reduction), rel=1e-2)
    assert phase.efficiency == pytest.approx(seconds(4) / 2 / (computing + reduction), rel=1e-3)


def test_more_gpus_cost_efficiency_that_larger_steps_and_overlap_give_back(tmp_path: Path) -> None:
    runs = plan_of(tmp_path, "plan.scale_to=1024").scaling
    assert [run.gpus for run in runs] == [1 << i for i in range(11)]
    assert [run.nodes for run in runs] == [1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128]
    efficiencies = [run.efficiency for run in runs]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[-1] < 0.1
    assert all(run.full_efficiency > run.efficiency for run in runs) and runs[-1].full_efficiency > 0.9
    hidden = plan_of(tmp_path, "plan.scale_to=1024", "plan.overlap=1").scaling
    assert all(0 < h.communication_share < r.communication_share for h, r in zip(hidden[1:], runs[1:], strict=True))
    unshared = "parallel.distributed_optimizer=false"
    assert all(
        run.communication_share == 0
        for run in plan_of(tmp_path, "plan.scale_to=1024", "plan.overlap=1", unshared).scaling
    )
    slow = plan_of(tmp_path, "plan.scale_to=1024", "plan.network_gb_per_second=3").scaling
    assert slow[3].total_seconds == pytest.approx(runs[3].total_seconds), "one node has no network in it"
    assert slow[-1].communication_share > runs[-1].communication_share


@pytest.mark.parametrize("gpus", [3, 48, 1024])
def test_forced_steps_are_the_next_that_the_ranks_can_share(gpus: int) -> None:
    config = parse(compose([*H100]))
    for phase in plan_phases(config.curriculum):
        forced = forced_tokens_per_step(config, phase, gpus)
        batch_layout(replace(phase, tokens_per_step=forced), gpus, 32768, config.precision.token_multiple)
        for fewer in range(phase.tokens_per_step, forced, phase.seq_len):
            with pytest.raises(UserError):
                batch_layout(replace(phase, tokens_per_step=fewer), gpus, 32768, config.precision.token_multiple)
        assert forced >= phase.tokens_per_step


def test_tensor_parallel_ranks_pay_for_what_they_send(tmp_path: Path) -> None:
    one = plan_of(tmp_path, "plan.scale_to=16").scaling[-1]
    two = plan_of(tmp_path, "plan.scale_to=16", "plan.gpus=2", "parallel.tensor_parallel=2").scaling
    assert [run.gpus for run in two] == [2, 4, 8, 16] == gpu_counts(16, 2)
    assert two[0].communication_share > 0.05
    assert two[-1].phases[-1].full_communication_share > one.phases[-1].full_communication_share


def test_the_tables_name_what_the_ranks_force(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=150)
    runs = plan_of(tmp_path, "plan.scale_to=1024").scaling
    print_scaling(runs, console)
    text = console.file.getvalue()
    assert "65,536 > 131,072" in text and "curriculum.phases.4.tokens_per_step=131072" in text
    assert "curriculum.phases.0.tokens_per_step" not in text
    assert f"{runs[-1].efficiency:.1%}" in text


@pytest.mark.parametrize(("measured", "within"), [("two_gpus_2026-11-25", 0.04), ("two_gpus_h200_2026-11-26", 0.045)])
def test_what_two_gpus_measured_is_what_it_says(measured: str, within: float) -> None:
    """From each length's speed on one of them, where the quartiles of a case lie up to 4% apart. Constants are fitted to the first."""
    cases = json.loads((RESULTS / f"{measured}.json").read_text())["cases"]
    complete(cases)
    pairs = [case for case in cases if case["gpus"] == 2]
    assert {case["layout"] for case in pairs} == set(LAYOUTS)
    for case in pairs:
        step_seconds = case["tokens_per_step"] / case["predicted_tokens_per_second"]
        assert step_seconds == pytest.approx(case["step_seconds_median"], rel=within), case["layout"]


def test_a_cpu_is_not_scaled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan\.scale_to"):
        make_plan(parse(compose([f"run.dir={tmp_path}", "plan.scale_to=8"])), [])
