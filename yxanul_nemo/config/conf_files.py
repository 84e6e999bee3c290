"""The files of `conf/`: where they lie, and what they say that they are for. Light: neither Hydra nor the schema."""

import re
from pathlib import Path

import yaml

REPO_DIR = Path(__file__).resolve().parents[2]
_IN_PACKAGE = Path(__file__).resolve().parents[1] / "conf"
CONF_DIR = _IN_PACKAGE if _IN_PACKAGE.is_dir() else REPO_DIR / "conf"
"""In an installed package it lies inside, with the recipes; in a clone at the top."""


def own_conf_dirs() -> list[Path]:
    """Return `./conf`, which may have recipes and curricula of the user's own, where it is there and not `CONF_DIR` itself."""
    here = Path("conf").absolute()
    return [here] if here.is_dir() and here.resolve() != CONF_DIR.resolve() else []


def first_comment(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file of `conf/`, which says what it is for."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = []
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        comments.append(line[2:].strip())
    return re.split(r"(?<=\.) ", " ".join(comments), maxsplit=1)[0].rstrip(".")


def recipes() -> dict[str, str]:
    """Return each recipe with its description."""
    found = {}
    for path in sorted((CONF_DIR / "recipe").glob("*.yaml")):
        found[path.stem] = yaml.safe_load(path.read_text(encoding="utf-8"))["run"]["description"]
    return found
