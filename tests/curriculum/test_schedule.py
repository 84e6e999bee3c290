"""The learning rate over whole runs, against torch's own schedulers where they have the same one."""

import pytest
import torch

from yxanul_nemo.config.training import OptimConfig
from yxanul_nemo.curriculum.schedule import learning_rate

TOTAL, STEP = 10_000, 100


def rates(optim: OptimConfig, scale: float = 1.0) -> list[float]:
    return [learning_rate(optim, tokens, TOTAL, scale) for tokens in range(STEP, TOTAL + 1, STEP)]


def test_cosine_is_torchs() -> None:
    optim = OptimConfig(lr=1.0, min_lr_ratio=0.1, decay="cosine")
    dummy = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, T_max=TOTAL // STEP, eta_min=0.1)
    expected = []
    for _ in range(TOTAL // STEP):
        dummy.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert rates(optim) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("warmup", [0.2, 2000])
def test_warmup_rises_linearly_from_nothing_to_the_peak(warmup: float) -> None:
    optim = OptimConfig(lr=3.0, warmup_tokens=warmup, decay="linear", min_lr_ratio=0.0)
    values = rates(optim)
    assert values[:20] == pytest.approx([3.0 * (i + 1) / 20 for i in range(20)])
    assert values[-1] == pytest.approx(0.0)
    assert max(values) == values[19]


def test_wsd_stays_and_then_falls() -> None:
    values = rates(OptimConfig(lr=1.0, decay="wsd", wsd_decay_ratio=0.25, min_lr_ratio=0.0))
    assert values[:75] == [1.0] * 75
    assert values[75:] == pytest.approx([(25 - i) / 25 for i in range(1, 26)])


def test_constant_stays_whatever_the_floor() -> None:
    assert set(rates(OptimConfig(lr=0.5, decay="constant", min_lr_ratio=0.1))) == {0.5}


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
def test_scale_multiplies_everywhere_and_the_end_is_the_floor(decay: str) -> None:
    optim = OptimConfig(lr=2.0, decay=decay, warmup_tokens=500, min_lr_ratio=0.1)
    assert rates(optim, 0.3) == pytest.approx([0.3 * rate for rate in rates(optim)])
    assert learning_rate(optim, TOTAL, TOTAL) == pytest.approx(2.0 if decay == "constant" else 0.2)
    assert learning_rate(optim, TOTAL + 1, TOTAL) == learning_rate(optim, TOTAL, TOTAL)
