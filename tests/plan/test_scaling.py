"""The simulation of more GPUs: against sums made by hand, against the plan for the GPUs themselves, and by its limits."""

import json
from pathlib import Path

import pytest

from benchmarks.two_gpus import LAYOUTS, complete
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.stages import PlanConfig
from yxanul_nemo.config.training import ParallelConfig, PrecisionConfig
from yxanul_nemo.machine.gpu_table import BY_KEY
from yxanul_nemo.plan.estimates import forecast_speed
from yxanul_nemo.plan.links import Links
from yxanul_nemo.plan.plan import Plan, make_plan

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
    plan = plan_of(tmp_path, *overrides, "curriculum.phases.0.tokens_per_step=131072", "plan.gpus=2")
    (phase,) = plan.phases
    fp8, model = PrecisionConfig(name="fp8_hybrid"), parse(compose(["model=yxanul_197m"])).model

    def seconds(accumulation: int) -> float:
        step = 2048, 32_768, accumulation
        one = forecast_speed(model, 200_005, fp8, ParallelConfig(), BY_KEY["h100"], *step)
        return accumulation * 32_768 / one.tokens_per_second

    # Two micro-batches for each rank.
    # All-reduced, or scattered and then gathered with half the bytes: each way half of them leave a GPU.
    computing, reduction = seconds(2), gradients_sent * GRADIENTS_BYTES / 252e9 + 8e-6
    assert phase.tokens_per_step / phase.tokens_per_second == pytest.approx(computing + reduction, rel=1e-3)


def test_more_gpus_take_less_time_and_pay_for_what_they_send(tmp_path: Path) -> None:
    one, eight = plan_of(tmp_path), plan_of(tmp_path, "plan.gpus=8")
    assert one.total_seconds / 8 < eight.total_seconds < one.total_seconds
    assert eight.total_gpu_hours > one.total_gpu_hours
    slow = plan_of(tmp_path, "plan.gpus=8", "plan.network_gb_per_second=3")
    assert slow.total_seconds == pytest.approx(eight.total_seconds), "one node has no network in it"
    two_nodes = ("plan.gpus=8", "plan.gpus_per_node=4")
    slow, fast = (plan_of(tmp_path, *two_nodes, f"plan.network_gb_per_second={speed}") for speed in (3, 50))
    assert slow.total_seconds > fast.total_seconds > eight.total_seconds


def test_tensor_parallel_ranks_pay_for_what_they_send(tmp_path: Path) -> None:
    def seconds(*overrides: str) -> float:
        return plan_of(tmp_path, "plan.gpus=2", "parallel.tensor_parallel=2", *overrides).total_seconds

    free = seconds("plan.node_gb_per_second=1e9", "plan.node_latency_microseconds=0")
    assert seconds() / free > 1.05


@pytest.mark.parametrize(("measured", "within"), [("two_gpus_2026-11-25", 0.04), ("two_gpus_h200_2026-11-26", 0.045)])
def test_what_two_gpus_measured_is_what_it_says(measured: str, within: float) -> None:
    """From each length's speed on one of them, where the quartiles of a case lie up to 4% apart. Constants are fitted to the first."""
    cases = json.loads((RESULTS / f"{measured}.json").read_text())["cases"]
    complete(cases)
    pairs = [case for case in cases if case["gpus"] == 2 and case["layout"] in LAYOUTS]
    assert {case["layout"] for case in pairs} == set(LAYOUTS)
    for case in pairs:
        step_seconds = case["tokens_per_step"] / case["predicted_tokens_per_second"]
        assert step_seconds == pytest.approx(case["step_seconds_median"], rel=within), case["layout"]
