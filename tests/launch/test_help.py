"""The help page names everything that there is."""

from yxanul_nemo.config.load import CONF_DIR
from yxanul_nemo.launch.help import LOOKING, PIPELINE, help_text
from yxanul_nemo.launch.lone_stages import LONE_STAGES
from yxanul_nemo.launch.stages import STAGES


def test_every_stage_has_its_line() -> None:
    assert tuple(PIPELINE) == STAGES
    assert set(LOOKING) == set(LONE_STAGES)


def test_every_recipe_and_option_is_named() -> None:
    text = help_text()
    for path in CONF_DIR.glob("*/*.yaml"):
        if path.stem != "default" and len(list(path.parent.glob("*.yaml"))) > 1:
            assert path.stem in text, path
    assert max(map(len, text.splitlines())) <= 132, "wide enough for a terminal"
