"""Scales of the fused layers from pass to pass."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

pytest.importorskip("triton", reason="Triton is installed on Linux hosts only")
from yxanul_nemo.model.delayed_scales import BACKWARD, FORWARD, LARGEST_SCALE, DelayedScales

E5M2 = torch.float8_e5m2


def make(history_len: int = 3, uses_max: bool = True, gradient_dtype: torch.dtype = E5M2, group=None) -> DelayedScales:
    return DelayedScales(2, history_len, uses_max, gradient_dtype, "cpu", group)


def scales_after(scales: DelayedScales, name: str, largest: list[float]) -> list[float]:
    """The scale that each pass finds, where the passes before saw these largest values in the second layer."""
    found = []
    for value in largest:
        slot = scales.begin_pass(is_training=True)[1][name]
        found.append(float(slot.scale))
        assert float(slot.scale * slot.scale_inv) == pytest.approx(1)
        slot.amax.fill_(value)
    return found


def test_a_scale_brings_the_largest_value_of_the_history_to_the_largest_number() -> None:
    assert scales_after(make(), "fc1", [2.0, 8.0, 1.0, 1.0, 1.0, 1.0]) == [1, 448 / 2, 448 / 8, 448 / 8, 448 / 8, 448]
    assert scales_after(make(uses_max=False), "fc1", [2.0, 8.0, 1.0, 0.5]) == [1, 448 / 2, 448 / 8, 448]
    assert scales_after(make(), "d_fc1", [2.0, 1.0]) == [1, 57344 / 2]
    assert scales_after(make(gradient_dtype=torch.float8_e4m3fn), "d_fc1", [2.0, 1.0]) == [1, 448 / 2]


def test_passes_that_say_nothing_leave_the_scale() -> None:
    assert scales_after(make(), "d_proj", [2.0, math.inf, 0.0, 4.0, 1.0]) == [1, 28672, 28672, 28672, 14336]
    assert scales_after(make(), "d_proj", [0.0, math.nan, 0.0]) == [1, 1, 1]
    assert scales_after(make(), "d_proj", [1e-44, 0.0])[1] == LARGEST_SCALE < math.inf


def test_a_pass_without_gradients_leaves_no_trace() -> None:
    scales = make()
    scales_after(scales, "qkv", [2.0, 3.0])
    before = {name: tensor.clone() for name, tensor in scales.tensors().items()}
    for slots in scales.begin_pass(is_training=False):
        for slot in slots.values():
            slot.amax.fill_(1e3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in scales.tensors().items())
    assert scales_after(scales, "qkv", [1.0])[0] == pytest.approx(448 / 3)


def test_the_state_is_all_that_a_resumed_run_needs() -> None:
    first, second = make(), make()
    scales_after(first, "proj", [5.0, 2.0])
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    assert scales_after(first, "proj", [1.0, 7.0, 3.0]) == scales_after(second, "proj", [1.0, 7.0, 3.0])


def test_each_matrix_has_a_scale_of_its_own_where_cublas_takes_it() -> None:
    slots = make().begin_pass(is_training=True)
    assert [set(of_layer) for of_layer in slots] == [{*FORWARD, *BACKWARD}] * 2
    for kind in ("scale", "scale_inv", "amax"):
        places = {getattr(slot, kind).data_ptr() for of_layer in slots for slot in of_layer.values()}
        assert len(places) == 2 * len(FORWARD + BACKWARD)
        assert kind != "scale_inv" or all(place % 16 == 0 for place in places)


def of_rank() -> list[float]:
    dist.init_process_group("gloo")
    return scales_after(make(group=dist.group.WORLD), "fc2", [1.0 + dist.get_rank(), 4.0, 1.0])


def test_ranks_agree_on_the_largest_value_of_all() -> None:
    assert run_ranks(of_rank, 2) == [[1, 448 / 2, 448 / 4]] * 2
