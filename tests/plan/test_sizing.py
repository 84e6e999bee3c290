"""Sizes of `recipe=mine`: they fill the hours, fit the memory, feed the model, and leave what is given as it is."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from yxanul_nemo.config.command_line import for_hydra
from yxanul_nemo.config.conf_files import CONF_DIR
from yxanul_nemo.config.load import compose, parse
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.curriculum.phases import plan_phases, total_tokens
from yxanul_nemo.errors import UserError
from yxanul_nemo.launch.own_settings import asked_settings
from yxanul_nemo.model.counts import parameter_count
from yxanul_nemo.plan.plan import make_plan
from yxanul_nemo.plan.sizing import (
    LADDER,
    TUNED_LR,
    expected_loss,
    held_out_share,
    learning_rate_for,
    read_model,
    tokens_per_step_for,
    vocabulary_for,
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text of about 3 MB."""
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(f"{number} some words of a text.\n\n" * 4000)
    return tmp_path / "text"


def asked(tmp_path: Path, *more: str) -> RunConfig:
    return asked_settings(for_hydra(["recipe=mine", f"run.dir={tmp_path}/run", *more])).config


@pytest.mark.parametrize("gpu", ["cpu", "rtx_4090", "h100"])
@pytest.mark.parametrize("hours", [1, 8, 40])
def test_the_plan_of_what_was_sized_takes_the_time(tmp_path: Path, gpu: str, hours: float) -> None:
    """With text without end, the steps of the plan, which knows nothing of the sizing, fill most of the hours and never more."""
    config = asked(tmp_path, "data=fineweb_edu", f"plan.gpu={gpu}", f"budget.hours={hours}")
    plan = make_plan(config, [])
    assert 0.6 * hours * 3600 < plan.total_seconds < hours * 3600
    assert plan.total_tokens > plan.parameters
    assert all(row.memory_bytes is None or row.memory_bytes < plan.gpu_memory_bytes for row in plan.phases)


def test_more_time_and_better_machines_never_take_a_smaller_model(tmp_path: Path) -> None:
    sizes = [
        make_plan(asked(tmp_path, "data=fineweb_edu", f"plan.gpu={gpu}", f"budget.hours={hours}"), []).parameters
        for gpu, hours in (("cpu", 1), ("cpu", 40), ("rtx_4090", 1), ("rtx_4090", 8), ("h100", 8), ("h100", 40))
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3


def test_little_text_is_read_four_times_at_most_by_a_model_that_it_feeds(text: Path, tmp_path: Path) -> None:
    config = asked(tmp_path, f"data.sources.text.path={text}", "budget.hours=100")
    tokens = total_tokens(plan_phases(config.curriculum))
    text_bytes = sum(path.stat().st_size for path in text.iterdir())
    vocab_size = config.tokenizer.vocab_size
    assert vocab_size is not None and vocab_size < 8192
    assert tokens < 4.1 * text_bytes / 2
    assert (
        tokens >= parameter_count(config.model, config.model.padded_vocab_size(vocab_size))
        or config.model.name == "yxanul_demo"
    )


def test_what_is_given_stays(text: Path, tmp_path: Path) -> None:
    given = ("model=yxanul_3m", "optim.lr=5e-3", "tokenizer.vocab_size=1000", "tokenizer.transition=700")
    config = asked(tmp_path, f"data.sources.text.path={text}", "budget.hours=1", *given)
    assert (config.model.name, config.optim.lr, config.tokenizer.vocab_size) == ("yxanul_3m", 5e-3, 1000)
    assert config.curriculum.name == "mine" and not any(size.startswith("model") for size in config.budget.sizes)


def test_a_repeated_command_and_its_folder_alone_keep_the_sizes(text: Path, tmp_path: Path) -> None:
    from yxanul_nemo.config.load import to_yaml

    command = (f"data.sources.text.path={text}", "budget.hours=1")
    first = asked(tmp_path, *command)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(first))
    (text / "more.txt").write_text("more text " * 1_000_000)
    assert asked(tmp_path, *command) == first
    alone = asked_settings(for_hydra([f"run.dir={tmp_path}/run"])).config
    assert alone.curriculum == first.curriculum and alone.budget == first.budget
    assert asked(tmp_path, command[0], "budget.hours=2").budget.sizes != first.budget.sizes


@pytest.mark.parametrize(
    ("settings", "words"), [(["budget.hours=1e-5"], "is 1e-05"), (["budget.hours=0"], "greater than 0")]
)
def test_hours_that_are_too_few_are_refused(text: Path, tmp_path: Path, settings: Sequence[str], words: str) -> None:
    with pytest.raises(UserError, match=rf"^budget\.hours: .*{words}"):
        asked(tmp_path, f"data.sources.text.path={text}", *settings)


def test_text_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.sources\.text\.path: /absent does not exist"):
        asked(tmp_path, "data.sources.text.path=/absent")


def test_too_little_text_to_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("some words")
    with pytest.raises(UserError, match=r"^data\.sources: hold about . documents"):
        asked(tmp_path, f"data.sources.text.path={tmp_path}/one.txt")


@pytest.mark.parametrize("documents", [8, 18, 60, 120, 1000, 10**6, math.inf])
def test_some_documents_are_held_out_and_most_are_not(documents: float) -> None:
    share = held_out_share(documents)
    assert share <= 0.3
    # The chance that no document is held out.
    assert documents == 8 or (1 - share) ** documents < 0.01


def test_the_loss_of_the_paper() -> None:
    """Chinchilla: 70e9 parameters and 1.4e12 tokens; more of either lowers it, and a text read twice is worth less than two."""
    chinchilla = expected_loss(70e9, 1.4e12 * 4.5, math.inf)
    assert chinchilla == pytest.approx(1.8172 + 482.01 / 70e9**0.3478 + 2085.43 / 1.4e12**0.3658, rel=1e-6)
    once, twice, new = expected_loss(1e8, 1e9, 1e9), expected_loss(1e8, 2e9, 1e9), expected_loss(1e8, 2e9, 2e9)
    assert new < twice < once


def test_rules_return_the_runs_that_they_are_from() -> None:
    assert [learning_rate_for(width) for width in TUNED_LR] == list(TUNED_LR.values())
    assert [tokens_per_step_for(tokens, 256) for tokens in (737_280, 50e6, 1e9)] == [1024, 32_768, 65_536]
    assert read_model("demo") == parse(compose([])).model


def test_the_ladder_rises_and_is_in_conf() -> None:
    models = [read_model(name) for name in LADDER]
    sizes = [
        parameter_count(model, model.padded_vocab_size(vocabulary_for(name, 1e12) or 200_005))
        for name, model in zip(LADDER, models, strict=True)
    ]
    assert sizes == sorted(sizes)
    assert {path.stem for path in (CONF_DIR / "model").glob("*.yaml")} == set(LADDER)
    assert 1e6 < sizes[0] < 1.3e6 and sizes[-1] > 2.7e8
