"""The table of what may change is complete, and settings are what it says."""

from collections.abc import Callable

import pytest

from yxanul_nemo.config.changes import CHANGES, change_of, decisive_settings, default_of, may_be_allowed, pattern_of
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.suggest import keys_of

WHOLE_SECTIONS = {name for name in CHANGES if name in RunConfig.model_fields}


def test_every_key_of_the_schema_is_sorted() -> None:
    """A key of a section that decides training has a line of its own: nobody forgets to think of a new one."""
    keys = set(keys_of(RunConfig))
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    leaves = {key for key in keys - sections if key.partition(".")[0] not in WHOLE_SECTIONS}
    assert leaves - CHANGES.keys() == set(), "keys of the schema that are not in the table"
    assert CHANGES.keys() - keys == set(), "keys of the table that are not in the schema"


def test_only_sections_that_decide_nothing_are_sorted_whole() -> None:
    assert {CHANGES[name] for name in WHOLE_SECTIONS} == {"free"}
    assert not WHOLE_SECTIONS & {"model", "tokenizer", "data", "curriculum", "optim", "precision", "guards", "run"}


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("optim.lr", "future"),
        ("curriculum.phases.2.tokens", "future"),
        ("data.sources.web.path", "by content"),
        ("data.sources.web.hub.repo", "by content"),
        ("logging.every_steps", "free"),
        ("validation.domains.c4.path", "free"),
        ("model.num_layers", "fixed"),
        ("nothing.of.it", None),
    ],
)
def test_a_key_is_found_with_numbers_and_names(key: str, change: str | None) -> None:
    assert change_of(key) == change


@pytest.mark.parametrize(
    ("name", "can"),
    [
        ("optim", True),
        ("optim.muon", True),
        ("curriculum.phases.3", True),
        ("curriculum", True),
        ("model", True),
        ("model.num_layers", False),
        ("logging", False),
        ("config", False),
    ],
)
def test_allow_names_keys_of_the_future_and_sections_with_some(name: str, can: bool) -> None:
    assert may_be_allowed(name) == can


def test_settings_have_what_decides_training_and_nothing_else(make_config: Callable[..., RunConfig]) -> None:
    settings = decisive_settings(make_config())
    assert settings["optim"] == "muon" and settings["optim.lr"] == 0.01 and settings["optim.muon.momentum"] == 0.95
    assert settings["data.sources"] == ["prose", "reference", "code"]
    assert {change_of(key) for key in settings} <= {"future", "fixed", None}
    assert not [key for key in settings if key.startswith(("curriculum.phases", "logging", "run.dir", "parallel"))]
    plain = decisive_settings(make_config("optim=adamw"))
    assert plain["optim"] == "adamw" and not [key for key in plain if key.startswith("optim.muon")]


def test_a_setting_that_an_older_run_lacks_has_the_schemas_default() -> None:
    assert default_of("guards.spike_sigma") is None and default_of("optim.muon.momentum") == 0.95
    with pytest.raises(KeyError):
        default_of("optim.lr")


def test_patterns() -> None:
    assert pattern_of("curriculum.phases.12.blend") == "curriculum.phases.N.blend"
    assert pattern_of("data.sources.a_b.hub.repo") == "data.sources.NAME.hub.repo"
