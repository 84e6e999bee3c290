"""The paired bootstrap against what statistics says of it."""

import math

import numpy as np
import pytest

from yxanul_nemo.validation.bootstrap import paired_bootstrap

N = 400


def drawn(seed: int, shift: float, noise: float = 1.0) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Nats of two models whose documents differ by far more than the models do, and sizes in bytes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(200, 2000, size=N)
    hard = sizes * rng.uniform(0.3, 1.2, size=N)
    return (hard + shift * sizes + rng.normal(0, noise, size=N) * np.sqrt(sizes), hard), sizes


def test_the_difference_is_that_of_the_sums_and_its_interval_that_of_theory() -> None:
    nats, sizes = drawn(1, 0.01)
    found = paired_bootstrap({"text": nats}, {"text": sizes})["text"]
    bits = (nats[0] - nats[1]) / math.log(2)
    assert found.difference == pytest.approx(bits.sum() / sizes.sum(), rel=1e-12)
    # Standard error of a ratio of sums, as in a textbook of survey sampling.
    error = math.sqrt(N / (N - 1) * np.square(bits - found.difference * sizes).sum()) / sizes.sum()
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.low < found.difference < found.high


def test_pairing_sees_what_separate_intervals_cannot() -> None:
    nats, sizes = drawn(2, -0.02)
    found = paired_bootstrap({"text": nats}, {"text": sizes})["text"]
    assert found.high < 0 and found.share_below_zero == 1.0
    alone = [of_model / math.log(2) / sizes for of_model in nats]
    assert 1.96 * alone[0].std() / math.sqrt(N) > abs(found.difference), (
        "each model's own error is larger than the difference"
    )


def test_equal_models_are_not_told_apart_and_mirrored_ones_give_mirrored_results() -> None:
    (first, _), sizes = drawn(3, 0.0)
    same = paired_bootstrap({"text": (first, first)}, {"text": sizes})["text"]
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    nats, sizes = drawn(4, 0.03)
    one = paired_bootstrap({"text": nats}, {"text": sizes})["text"]
    other = paired_bootstrap({"text": nats[::-1]}, {"text": sizes})["text"]
    assert (other.difference, other.low, other.high) == pytest.approx((-one.difference, -one.high, -one.low))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 200 samples of a known population, 95% must hold its difference, give or take four standard errors of that share."""
    truth, held = 0.0, 0
    for seed in range(200):
        nats, sizes = drawn(100 + seed, truth)
        found = paired_bootstrap({"text": (nats[0][:60], nats[1][:60])}, {"text": sizes[:60]})["text"]
        held += found.low <= truth <= found.high
    assert abs(held / 200 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 200)


def test_the_mean_is_over_domains_drawn_independently() -> None:
    (a, a_sizes), (b, b_sizes) = drawn(5, 0.02), drawn(6, -0.01)
    found = paired_bootstrap({"a": a, "b": b}, {"a": a_sizes, "b": b_sizes})
    assert list(found) == ["a", "b", "mean"]
    assert found["mean"].difference == pytest.approx((found["a"].difference + found["b"].difference) / 2)
    widths = {name: value.high - value.low for name, value in found.items()}
    assert widths["mean"] == pytest.approx(math.hypot(widths["a"], widths["b"]) / 2, rel=0.05)
