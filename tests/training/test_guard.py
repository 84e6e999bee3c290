"""The guard's decisions against a plain reference, and its state through a checkpoint. Torch is imported in children."""

import math
import random
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_ranks
from yxanul_nemo.config.training import GuardsConfig

Series = list[tuple[float, float]]


def decide(series: Series, config: GuardsConfig, moves_at: int = -1, folder: Path | None = None) -> list[bool]:
    """What the guard says to each step of (loss, norm); at one of them it goes on as another guard, through a checkpoint."""
    import torch

    from yxanul_nemo.checkpoint.shards import ShardReader, save_shards
    from yxanul_nemo.config.training import ParallelConfig
    from yxanul_nemo.machine.runtime import init_process_groups
    from yxanul_nemo.training.guard import UpdateGuard

    init_process_groups(ParallelConfig(device="cpu"), "cpu", 0)
    guard, said = UpdateGuard(config, torch.device("cpu")), []
    for step, (loss, norm) in enumerate(series):
        if step == moves_at:
            save_shards(guard.sharded_state(), folder, 0)
            guard = UpdateGuard(config, torch.device("cpu"))
            ShardReader(folder).load_into(guard.sharded_state())
        said.append(guard.admits(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm)))
    assert all(tensor.shape == () and tensor.dtype == torch.bool for tensor in said)
    return [bool(tensor) for tensor in said]


def reference(series: Series, sigma: float | None, window: int) -> list[bool]:
    history: deque[tuple[float, float]] = deque(maxlen=window)
    said = []
    for step in series:
        step = step[0], float(np.float32(step[1]))
        finite = all(map(math.isfinite, step))
        spike = False
        if finite and sigma is not None and len(history) >= window // 2:
            past = np.array(history)
            spike = bool((np.array(step) > past.mean(0) + sigma * past.std(0, ddof=1)).any())
        if finite:
            history.append(step)
        said.append(finite and not spike)
    return said


def noisy(seed: int, steps: int) -> Series:
    """A falling loss with noise, spikes of all sizes, a lasting rise, and values that are not finite."""
    draw = random.Random(seed)
    series = []
    for step in range(steps):
        loss = 8 / (1 + step / 50) + draw.gauss(0, 0.1) + (2.0 if step > 200 else 0.0)
        norm = math.exp(draw.gauss(0, 0.3))
        if draw.random() < 0.05:
            loss += draw.choice([0.3, 1.0, 5.0, math.nan, math.inf])
        if draw.random() < 0.05:
            norm *= draw.choice([3.0, 10.0, 1e4, math.nan, math.inf, -math.inf])
        series.append((loss, norm))
    return series


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("sigma", "window"), [(6.0, 128), (3.0, 9), (6.0, 4), (None, 128)])
def test_it_decides_as_the_plain_reference(tmp_path: Path, seed: int, sigma: float | None, window: int) -> None:
    series = noisy(seed, 400)
    config = GuardsConfig(spike_sigma=sigma, spike_window_steps=window)
    expected = reference(series, sigma, window)
    moves_at = -1 if sigma is None else 100 + seed
    assert run_ranks(decide, 1, series, config, moves_at, tmp_path)[0] == expected
    finite = [all(map(math.isfinite, step)) for step in series]
    if sigma is None:
        assert expected == finite
    else:
        assert 3 < sum(finite) - sum(expected) < 60, "no spike was skipped, or everything was"


def test_one_spike_is_enough_of_either_kind() -> None:
    calm = [(3.0 + 0.01 * (step % 7), 1.0 + 0.01 * (step % 5)) for step in range(128)]
    config = GuardsConfig(spike_sigma=6.0)
    for last, admitted in [((3.03, 1.02), True), ((4.0, 1.0), False), ((3.0, 2.0), False), ((1.0, 0.1), True)]:
        assert run_ranks(decide, 1, [*calm, last], config)[0] == [True] * 128 + [admitted]
