"""The shipped curricula against the figures that yxanul_0.6B published, and what every shipped file must keep."""

from math import isclose

import pytest
import yaml

from yxanul_nemo.config.conf_files import CONF_DIR, REPO_DIR
from yxanul_nemo.config.curriculum import CurriculumConfig
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.curriculum.phases import Phase, plan_phases, tokens_per_source, total_tokens

LENGTHS = [8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048]
LR_LADDER = [0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 0.95, 1.0, 1.0, 1.0]
CLIP_LADDER = [0.5, 0.5, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0]
FOLDERS = (CONF_DIR / "curriculum", REPO_DIR / "benchmarks" / "conf" / "curriculum")
FILES = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))}


def curriculum(name: str) -> CurriculumConfig:
    """One of `FILES` by the schema alone."""
    return CurriculumConfig.model_validate(yaml.safe_load(FILES[name].read_text(encoding="utf-8")))


def phases(name: str) -> list[Phase]:
    """Its phases in whole steps."""
    return plan_phases(curriculum(name))


@pytest.mark.parametrize("name", FILES)
def test_every_curriculum_is_named_described_and_blended_in_whole_shares(name: str) -> None:
    config = curriculum(name)
    assert config.name == name
    for phase in config.phases:
        assert phase.description
        for blend in (phase.blend, config.blend):
            assert blend is None or isclose(sum(blend.values()), 1.0, abs_tol=1e-9)


@pytest.mark.parametrize("name", FILES)
def test_rounding_to_whole_steps_moves_no_phase_by_more_than_half_a_step(name: str) -> None:
    config = curriculum(name)
    for phase, configured in zip(phases(name), config.phases, strict=True):
        assert abs(phase.tokens - configured.tokens) <= configured.tokens_per_step / 2


def test_ultra_spends_the_published_tokens_between_the_published_steps() -> None:
    """Steps are optimizer steps: micro-batch x accumulation x length tokens each."""
    starts = [0, 2000, 5000, 10000, 20000, 35000, 55000, 80000, 110000, 140000]
    micro_batches = [512, 256, 128, 64, 32, 16, 8, 16, 8, 8]
    accumulations = [8, 4, 4, 4, 4, 4, 4, 3, 6, 4]
    planned = phases("ultra")
    assert total_tokens(planned) == 8_593_408_000
    assert [p.seq_len for p in planned] == LENGTHS
    assert [sum(p.steps for p in planned[:i]) for i in range(10)] == starts
    assert sum(p.steps for p in planned) == 200_000
    per_step = [m * a * s for m, a, s in zip(micro_batches, accumulations, LENGTHS, strict=True)]
    assert [p.tokens_per_step for p in planned] == per_step
    assert [p.lr_scale for p in planned] == LR_LADDER
    assert [p.grad_clip for p in planned] == CLIP_LADDER


def test_h200_spends_the_published_tokens_between_the_published_steps() -> None:
    starts = [0, 3000, 8000, 15000, 30000, 50000, 80000, 120000, 170000, 220000]
    batches = [4096, 2048, 1024, 512, 256, 128, 64, 48, 24, 16]
    planned = phases("h200")
    assert total_tokens(planned) == 10_240_000_000
    assert [sum(p.steps for p in planned[:i]) for i in range(10)] == starts
    assert [p.windows_per_step for p in planned] == batches
    assert [p.seq_len for p in planned] == LENGTHS
    assert [p.lr_scale for p in planned] == LR_LADDER
    assert [p.grad_clip for p in planned] == CLIP_LADDER


@pytest.mark.parametrize(
    ("name", "windows", "published_steps"),
    [
        (
            "h100",
            [8192, 4096, 2048, 1024, 512, 256, 128, 96, 48, 40],
            [152, 305, 457, 610, 1144, 1525, 1907, 2034, 2712, 3051],
        ),
        (
            "progressive",
            [512, 256, 128, 64, 32, 16, 8, 8, 8, 8],
            [2441, 4882, 7324, 9765, 18310, 24414, 30517, 24414, 16276, 15258],
        ),
    ],
)
def test_the_billion_token_curricula_share_tokens_and_blends(
    name: str, windows: list[int], published_steps: list[int]
) -> None:
    config, planned = curriculum(name), phases(name)
    tokens = [10, 20, 30, 40, 75, 100, 125, 150, 200, 250]
    assert [p.tokens for p in config.phases] == [t * 10**6 for t in tokens]
    assert [p.seq_len for p in planned] == LENGTHS
    assert [p.windows_per_step for p in planned] == windows
    # The published steps are rounded down, ours to the nearest.
    assert all(p.steps - s in (0, 1) for p, s in zip(planned, published_steps, strict=True))
    percent = [tuple(round(100 * (p.blend or {})[n]) for n in ("text", "math", "code")) for p in planned]
    assert percent == [
        (95, 5, 0),
        (95, 5, 0),
        (90, 8, 2),
        (85, 10, 5),
        (80, 12, 8),
        (75, 15, 10),
        (70, 18, 12),
        (65, 20, 15),
        (60, 22, 18),
        (55, 25, 20),
    ]
    assert {p.grad_clip for p in planned} == {p.lr_scale for p in planned} == {1.0}
    assert total_tokens(planned) == pytest.approx(1e9, rel=2e-4)


def test_experimental_1b_and_its_control_read_the_same_tokens_of_each_source() -> None:
    planned = phases("experimental_1b")
    assert [p.seq_len for p in planned] == [16, 32, 64, 128, 256, 512, 1024, 2048]
    assert [p.tokens // 10**6 for p in curriculum("experimental_1b").phases] == [20, 30, 40, 60, 80, 120, 150, 500]
    assert [p.windows_per_step for p in planned] == [256, 256, 128, 128, 64, 32, 16, 16]
    control = phases("fixed_2048")
    assert [(p.seq_len, p.tokens_per_step) for p in control] == [(2048, 4 * 8 * 2048)]
    assert total_tokens(control) == pytest.approx(total_tokens(planned), rel=1e-4)

    runs = [parse(compose([f"recipe=yxanul_197m_{name}"])) for name in ("experimental_1b", "fixed_2048")]
    sizes = {"text": 10**9, "math": 10**8, "code": 10**8}
    experiment, fixed = (tokens_per_source(plan_phases(run.curriculum), sizes) for run in runs)
    assert experiment == pytest.approx(fixed, rel=1e-4)
    assert runs[0].optim == runs[1].optim
    assert (runs[0].model, runs[0].data) == (runs[1].model, runs[1].data)


def test_a_total_scales_every_phase() -> None:
    scaled = parse(compose(["recipe=yxanul_197m_ultra", "curriculum.total_tokens=1e9"]))
    whole = phases("ultra")
    for phase, full in zip(plan_phases(scaled.curriculum), whole, strict=True):
        assert phase.tokens == pytest.approx(full.tokens * 1e9 / 8_593_408_000, abs=phase.tokens_per_step)
