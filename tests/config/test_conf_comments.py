"""Every key that stands in `conf/` says there, in a line of its own, what it is."""

import re
from pathlib import Path

import pytest

from yxanul_nemo.config.conf_files import CONF_DIR, REPO_DIR

FOLDERS = (CONF_DIR, REPO_DIR / "benchmarks" / "conf")
OPTIONS = (path for folder in FOLDERS for path in folder.glob("*/*.yaml") if path.parent.name != "recipe")
FILES = sorted([CONF_DIR / "config.yaml", *OPTIONS])
KEY = re.compile(r"^(?P<indent>[ ]*)(?P<item>- )?(?P<key>[A-Za-z_][\w/ ]*):(?P<rest>.*)$")


def uncommented(text: str) -> list[str]:
    """Keys without a comment above or beside them. A key inside a list or map may also be explained once in the file: above or
    beside its first mention, or in a comment as `key (what it is)`."""
    lines = text.splitlines()
    explained = set(re.findall(r"(\w+) \(", "\n".join(line for line in lines if line.lstrip().startswith("#"))))
    missing: list[str] = []
    block_scalar_indent: int | None = None
    for above, line in zip(["", *lines], lines, strict=False):
        indent = len(line) - len(line.lstrip())
        if block_scalar_indent is not None and (not line.strip() or indent > block_scalar_indent):
            continue
        block_scalar_indent = None
        found = KEY.match(line)
        if found is None or line.lstrip().startswith("#"):
            continue
        if found["rest"].strip() in ("|", ">"):
            block_scalar_indent = indent
        key = found["key"]
        if above.lstrip().startswith("#") or " #" in found["rest"]:
            explained.add(key)
        elif not (found["indent"] or found["item"]) or key not in explained:
            missing.append(f"{key} (line {lines.index(line) + 1})")
    return missing


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_has_its_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "config.yaml":
        # Of the rest, Hydra's own keys, its template for --help is the explanation.
        text = text[text.index("# Steps of the pipeline") : text.index("\nhydra:")]
    names_of_maps = r"^  (?:prose|reference|code|english|math|text|docs):$"
    assert uncommented(re.sub(names_of_maps, "", text, flags=re.MULTILINE)) == []


def test_a_key_without_a_comment_is_found() -> None:
    assert uncommented("# a\na: 1\nb: 2\n") == ["b (line 3)"]
    assert uncommented("# Each phase: x (what).\nphases:\n  - x: 1\n    y: 2\n") == ["y (line 4)"]
