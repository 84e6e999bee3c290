"""Data parallel 2 and tensor parallel 2 are 1, and checkpoints move between them (processes on gloo)."""

from pathlib import Path

import numpy as np
import pytest

from tests.model.layouts import logits_and_gradients, train, whole_tensors
from tests.ranks import run_ranks

LAYOUTS = {
    "one": (1, {}),
    "data_2": (2, {}),
    "data_2_unshared": (2, {"distributed_optimizer": False}),
    "tensor_2": (2, {"tensor_parallel": 2}),
    "data_4": (4, {}),
    "data_2_tensor_2": (4, {"tensor_parallel": 2}),
}
"""Processes, and what differs from the default, where data-parallel ranks share out the optimizer's state."""
SAVED = ("one", "data_2", "data_2_unshared", "tensor_2", "data_2_tensor_2")


@pytest.fixture(scope="module", params=[False, True], ids=["adamw", "muon"])
def muon(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def folder(muon: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def trained(muon: bool, layout: str, load_from: Path | None, save_to: Path | None) -> list[tuple[float, float]]:
    ranks, options = LAYOUTS[layout]
    return run_ranks(train, ranks, muon, options, load_from, save_to)[0]


@pytest.fixture(scope="module")
def records(muon: bool, folder: Path) -> dict[str, list[tuple[float, float]]]:
    return {name: trained(muon, name, None, folder / name) for name in SAVED}


@pytest.fixture(scope="module")
def gone_on(records: dict, muon: bool, folder: Path) -> list[tuple[float, float]]:
    return trained(muon, "one", folder / "one", None)


@pytest.mark.parametrize("layout", SAVED[1:])
def test_losses_and_gradient_norms_equal_those_of_one_process(records: dict, layout: str) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(records[layout], records["one"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize("layout", SAVED[1:])
def test_weights_and_moments_equal_those_of_one_process(records: dict, folder: Path, layout: str) -> None:
    found, expected = whole_tensors(folder / layout), whole_tensors(folder / "one")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = 1e-4 * max(np.abs(tensor).max(), 1e-12)
        np.testing.assert_allclose(found[name], tensor, rtol=1e-3, atol=tolerance, err_msg=name)


def test_ranks_that_share_out_the_optimizer_write_about_as_much_each(records: dict, folder: Path) -> None:
    shared, unshared = (
        [sum(file.stat().st_size for file in (folder / name).glob(f"rank_{rank:05d}*")) for rank in (0, 1)]
        for name in ("data_2", "data_2_unshared")
    )
    assert max(shared) < 0.6 * sum(shared) and unshared[0] > 0.9 * sum(unshared)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tensor_2", "one"),
        ("one", "tensor_2"),
        ("data_2", "tensor_2"),
        ("data_2", "one"),
        ("data_2", "data_4"),
        ("data_2", "data_2_unshared"),
        ("data_2_unshared", "data_2"),
        ("tensor_2", "data_4"),
        ("data_2_tensor_2", "data_2"),
        ("one", "data_2_tensor_2"),
    ],
)
def test_training_goes_on_in_another_layout(
    gone_on: list[tuple[float, float]], muon: bool, folder: Path, source: str, target: str
) -> None:
    resumed = trained(muon, target, folder / source, None)
    for (loss, norm), (expected_loss, expected_norm) in zip(resumed, gone_on, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_logits_and_their_gradients_are_those_of_one_process_on_every_rank() -> None:
    ((expected, expected_grad),) = run_ranks(logits_and_gradients, 1, 1)
    for logits, grad in run_ranks(logits_and_gradients, 2, 2):
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)
