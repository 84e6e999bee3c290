"""docs/config.md is what the schema says now."""

from yxanul_nemo.config.reference import PATH, reference
from yxanul_nemo.config.run import RunConfig
from yxanul_nemo.config.suggest import keys_of


def test_the_reference_is_current() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `uv run python -m yxanul_nemo.config.reference`"


def test_every_key_has_a_row_with_its_meaning() -> None:
    text = reference()
    rows = [[cell.strip(" `|") for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    meanings = {row[0]: row[-1] for row in rows if len(row) == 4}
    sections = {name for name in RunConfig.model_fields if f"\n## {name}\n" in text}
    keys = set(keys_of(RunConfig)) - sections
    for key in keys:
        # A section in a section has a row for each of its keys instead.
        if not any(other.startswith(f"{key}.") for other in keys - {key}) or key in meanings:
            assert len(meanings[key]) > 5, key
