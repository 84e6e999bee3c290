"""Blends moved by surprise ratios, as pure functions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.adapt import adapted_blend, largest_shares, sources_of_domains
from yxanul_nemo.curriculum.phases import check_enough_tokens, plan_phases
from yxanul_nemo.errors import UserError
from yxanul_nemo.validation.record import phase_result_path, ratios_after

THREE = parse(compose(["recipe=yxanul_197m_h100", "curriculum.adapt_blend=true"]))
SIZES = {"text": 7_000_000, "math": 2_000_000, "code": 1_000_000}
BLEND = {"text": 0.6, "math": 0.3, "code": 0.1}


def test_domains_speak_for_sources() -> None:
    assert sources_of_domains(THREE) == {"english": "text", "math": "math", "code": "code"}


def test_shares_follow_the_ratios() -> None:
    moved = adapted_blend(THREE, BLEND, SIZES, {"english": 1.0, "math": 1.2, "code": 0.9})
    assert moved == pytest.approx({"text": 0.6 / 1.05, "math": 0.36 / 1.05, "code": 0.09 / 1.05}, abs=1e-4)
    by_size = adapted_blend(THREE, None, SIZES, {"english": 1.0, "math": 1.2, "code": 0.9})
    assert by_size == pytest.approx({"text": 0.7 / 1.03, "math": 0.24 / 1.03, "code": 0.09 / 1.03}, abs=1e-4)


def test_bounds_hold_and_zero_stays_zero() -> None:
    moved = adapted_blend(
        THREE, {"text": 0.5, "math": 0.5, "code": 0}, SIZES, {"english": 5.0, "math": 0.1, "code": 9.0}
    )
    assert moved == pytest.approx({"text": 1.25 / 2.05, "math": 0.8 / 2.05, "code": 0}, abs=1e-4)


@given(
    ratios=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_no_ratios_lead_outside_what_is_planned_for(ratios: list[float], shares: list[float]) -> None:
    if sum(shares) < 1e-3:
        return
    blend = dict(zip(SIZES, shares, strict=True))
    moved = adapted_blend(THREE, blend, SIZES, dict(zip(("english", "math", "code"), ratios, strict=True)))
    assert sum(moved.values()) == pytest.approx(1, abs=2e-4)
    most = largest_shares(np.array(shares) / sum(shares), THREE.curriculum.adapt_blend_bounds)
    assert all(share <= limit + 1e-4 for share, limit in zip(moved.values(), most, strict=True))


def test_the_corpus_must_have_enough_for_the_worst_case() -> None:
    phases = plan_phases(THREE.curriculum)
    needed = check_enough_tokens(
        THREE.model_copy(update={"data": THREE.data.model_copy(update={"max_epochs": 1e9})}), phases, SIZES
    )
    plain = THREE.model_copy(update={"curriculum": THREE.curriculum.model_copy(update={"adapt_blend": False})})
    sizes = {name: tokens * SIZES[name] / 3.9 for name, tokens in needed.items()}
    check_enough_tokens(THREE, phases, sizes)
    less = sizes | {"math": sizes["math"] * 0.95}
    check_enough_tokens(plain, phases, less)
    with pytest.raises(UserError, match=r"reads source .math. .* up to 4\.1"):
        check_enough_tokens(THREE, phases, less)


def test_the_recorded_result_must_be_of_where_the_run_stands(tmp_path: Path) -> None:
    path = phase_result_path(tmp_path, 2)
    with pytest.raises(UserError, match=r"phase-02\.json: does not exist.*stage=train phases=2"):
        ratios_after(tmp_path, 2, 500)
    path.parent.mkdir()
    path.write_text(json.dumps({"tokens_total": 500, "surprise_ratio_bits_per_byte": {"prose": 1.1}}))
    assert ratios_after(tmp_path, 2, 500) == {"prose": 1.1}
    with pytest.raises(UserError, match="is of 500 tokens; expected 600"):
        ratios_after(tmp_path, 2, 600)
    path.write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        ratios_after(tmp_path, 2, 500)


def test_a_domain_for_an_unknown_source_and_odd_bounds_are_refused(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"for_source=txt is not in data\.sources"):
        make_config("curriculum.adapt_blend=true", "+validation.domains.prose.for_source=txt")
    make_config("+validation.domains.prose.for_source=txt")
    with pytest.raises(UserError, match="the first must be above 0 and at most 1"):
        make_config("curriculum.adapt_blend_bounds=[1.1,2]")
