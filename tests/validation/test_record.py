"""Early stop as a function of recorded results."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.errors import UserError
from yxanul_nemo.validation.record import (
    early_stop_tokens,
    in_phase_result_path,
    in_phase_results,
    metric_of,
    phase_result_path,
)

MakeConfig = Callable[..., RunConfig]


def record(folder: Path, values: list[float]) -> None:
    """One result after every 1,000 tokens, the first half in phase 1 and the rest in phase 2."""
    for i, value in enumerate(values):
        path = in_phase_result_path(folder, 1 if i < len(values) / 2 else 2, (i + 1) * 1000)
        path.parent.mkdir(exist_ok=True)
        scores = {name: {"bits_per_byte": value, "perplexity": 10 - value} for name in ("prose", "reference", "code")}
        path.write_text(json.dumps({"mean_bits_per_byte": value, "domains": scores}))


@pytest.mark.parametrize(
    ("values", "patience", "improvement", "expected"),
    [
        ([3, 2, 1], 1, 0, None),
        ([3, 2, 2], 1, 0, 3000),
        ([3, 2, 2.5, 1.9, 2, 2.1], 2, 0, 6000),
        ([3, 2, 2.5, 1.9, 2, 2.1], 3, 0, None),
        ([3, 2.95, 2.9, 2.85], 2, 0.2, 3000),
        ([3, 2.95, 2.7, 2.65], 2, 0.2, None),
        ([3, 4, 1, 1, 1], 1, 0, 2000),
        ([], 1, 0, None),
    ],
)
def test_training_ends_where_nothing_improved_for_long(
    tmp_path: Path,
    make_config: MakeConfig,
    values: list[float],
    patience: int,
    improvement: float,
    expected: int | None,
) -> None:
    record(tmp_path, values)
    phase_result_path(tmp_path, 1).parent.mkdir(exist_ok=True)
    phase_result_path(tmp_path, 1).write_text('{"mean_bits_per_byte": 0.1}')
    settings = (
        f"run.dir={tmp_path}", "validation.every_tokens=1000", f"validation.early_stop_patience={patience}",
        f"validation.early_stop_min_improvement={improvement}",
    )  # fmt: skip
    assert early_stop_tokens(make_config(*settings)) == expected
    assert early_stop_tokens(make_config(*settings[:2])) is None
    assert [tokens for tokens, _ in in_phase_results(tmp_path)] == [1000 * (i + 1) for i in range(len(values))]


def test_another_metric_may_decide(tmp_path: Path, make_config: MakeConfig) -> None:
    """Here the perplexity rises where bits per byte fall."""
    record(tmp_path, [3, 2, 1])
    settings = (f"run.dir={tmp_path}", "validation.every_tokens=1000", "validation.early_stop_patience=2")
    assert early_stop_tokens(make_config(*settings)) is None
    assert early_stop_tokens(make_config(*settings, "validation.best_metric=code.perplexity")) == 3000
    assert metric_of({"domains": {"a.b": {"perplexity": 7}}}, "a.b.perplexity") == 7


def test_settings_that_mean_nothing_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="best_metric=bits is none of mean_bits_per_byte, "):
        make_config("validation.best_metric=bits")
    with pytest.raises(UserError, match="early_stop_patience=2 needs every_tokens"):
        make_config("validation.early_stop_patience=2")
