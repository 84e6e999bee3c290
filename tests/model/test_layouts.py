"""Data parallel 2 and tensor parallel 2 are 1, and checkpoints move between them (processes on gloo)."""

from pathlib import Path

import numpy as np
import pytest

from tests.model.layouts import logits_and_gradients, train
from tests.ranks import run_ranks

LAYOUTS = {"one": (1, 1), "data_2": (2, 1), "tensor_2": (2, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, list[tuple[float, float]]]:
    return {name: run_ranks(train, ranks, tp, None, folder / name)[0] for name, (ranks, tp) in LAYOUTS.items()}


@pytest.mark.parametrize("layout", ["data_2", "tensor_2"])
def test_losses_and_gradient_norms_equal_those_of_one_process(records: dict, layout: str) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(records[layout], records["one"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize(("source", "target"), [("tensor_2", "one"), ("one", "tensor_2"), ("data_2", "tensor_2")])
def test_training_goes_on_in_another_layout(records: dict, folder: Path, source: str, target: str) -> None:
    ranks, tensor_parallel = LAYOUTS[target]
    expected = run_ranks(train, 1, 1, folder / "one", None)[0]
    resumed = run_ranks(train, ranks, tensor_parallel, folder / source, None)[0]
    for (loss, norm), (expected_loss, expected_norm) in zip(resumed, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_logits_and_their_gradients_are_those_of_one_process_on_every_rank() -> None:
    ((expected, expected_grad),) = run_ranks(logits_and_gradients, 1, 1)
    for logits, grad in run_ranks(logits_and_gradients, 2, 2):
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)
