"""Phases in whole steps, batches for a machine, and enough data: pure functions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yxanul_nemo.config.curriculum import CurriculumConfig
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.curriculum.phases import (
    batch_layout,
    check_chunks,
    check_enough_tokens,
    plan_phases,
    selected_phases,
    tokens_per_source,
    total_tokens,
)
from yxanul_nemo.errors import UserError


def curriculum(*phases: tuple[int, int, int], **more: object) -> CurriculumConfig:
    """Phases as (tokens, seq_len, tokens_per_step)."""
    keys = ("tokens", "seq_len", "tokens_per_step")
    return CurriculumConfig(name="t", phases=[dict(zip(keys, phase, strict=True)) for phase in phases], **more)


def test_phases_follow_each_other_without_gap() -> None:
    phases = plan_phases(curriculum((1000, 10, 100), (990, 30, 300), (4000, 50, 500)))
    assert [p.first_token for p in phases] == [0, 1000, 1900]
    assert [p.tokens for p in phases] == [1000, 900, 4000]
    assert total_tokens(phases) == 5900


@given(total=st.floats(1e4, 1e10), shares=st.lists(st.integers(1, 10**9), min_size=1, max_size=10))
def test_scaling_keeps_shares_to_one_step(total: float, shares: list[int]) -> None:
    phases = plan_phases(curriculum(*((share, 8, 64) for share in shares), total_tokens=total))
    for phase, share in zip(phases, shares, strict=True):
        assert phase.tokens % 64 == 0
        assert abs(phase.tokens - max(64, total * share / sum(shares))) <= 64


@given(
    windows=st.integers(1, 5000),
    ranks=st.integers(1, 16),
    seq_len=st.sampled_from([8, 64, 2048]),
    most=st.integers(1, 10**5),
)
def test_a_layout_holds_exactly_the_promised_tokens(windows: int, ranks: int, seq_len: int, most: int) -> None:
    phase = plan_phases(curriculum((windows * seq_len, seq_len, windows * seq_len)))[0]
    if windows % ranks:
        with pytest.raises(UserError, match="cannot share evenly"):
            batch_layout(phase, ranks, most)
        return
    size, accumulation = batch_layout(phase, ranks, most)
    assert size * accumulation * ranks == windows
    assert size * seq_len <= most or size == 1
    if accumulation > 1:
        larger = [s for s in range(size + 1, windows // ranks + 1) if windows // ranks % s == 0]
        assert all(s * seq_len > most for s in larger)


def test_fp8_layouts_hold_a_multiple_of_eight_tokens_in_every_micro_batch() -> None:
    """Windows of 12 tokens: 10 of them are 120 = 15 x 8 tokens, 5 are 60, which is no multiple of 8."""
    phase = plan_phases(curriculum((240, 12, 240)))[0]
    assert batch_layout(phase, 1, 130) == (10, 2)
    assert batch_layout(phase, 1, 60) == (5, 4)
    assert batch_layout(phase, 1, 60, token_multiple=8) == (4, 5)
    with pytest.raises(UserError, match=r"phase 1: tokens_per_step.*multiple of 8 tokens"):
        batch_layout(phase, 1, 20, token_multiple=8)
    with pytest.raises(UserError, match=r"phase 1: tokens_per_step.*multiple of 96"):
        batch_layout(phase, 4, 1000, token_multiple=8)


def test_blends_decide_what_each_source_gives() -> None:
    config = curriculum((1000, 10, 100), (2000, 10, 100), blend={"a": 3, "b": 1})
    assert tokens_per_source(plan_phases(config), {"a": 10, "b": 10}) == {"a": 2250, "b": 750}
    plain = curriculum((1000, 10, 100))
    assert tokens_per_source(plan_phases(plain), {"a": 300, "b": 100}) == {"a": 750, "b": 250}


def test_too_little_data_is_refused_with_the_epochs_it_would_take() -> None:
    config = parse(compose(["data.max_epochs=1.5"]))
    phases = plan_phases(curriculum((1000, 10, 100)))
    assert check_enough_tokens(config, phases, {"prose": 800, "reference": 0, "code": 0})["prose"] == 1.25
    with pytest.raises(UserError, match=r"data.max_epochs.*2\.00 times.*max_epochs=2\.01"):
        check_enough_tokens(config, phases, {"prose": 500, "reference": 0, "code": 0})


@pytest.mark.parametrize(("selection", "expected"), [(None, [1, 2, 3]), (2, [2]), ("2", [2]), ("2-3", [2, 3])])
def test_selection_of_phases(selection: str | int | None, expected: list[int]) -> None:
    assert list(selected_phases(selection, 3)) == expected


@pytest.mark.parametrize("selection", ["0", "4", "3-2", "x", "1-", "-1", 0])
def test_impossible_selection_of_phases(selection: str | int) -> None:
    if selection == "1-":
        assert list(selected_phases(selection, 3)) == [1]
        return
    with pytest.raises(UserError, match="phases"):
        selected_phases(selection, 3)


def test_windows_too_short_to_be_shared_are_refused() -> None:
    short, long, odd = plan_phases(curriculum((1024, 256, 256), (1024, 512, 512), (1030, 515, 515)))
    check_chunks(long, 2)
    check_chunks(short, 1)
    for phase, ranks in ((short, 2), (odd, 2), (long, 4)):
        with pytest.raises(
            UserError, match=rf"phase {phase.number}: seq_len: is {phase.seq_len}, .*context_parallel={ranks}"
        ):
            check_chunks(phase, ranks)
