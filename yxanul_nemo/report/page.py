"""From parts to a page that needs nothing besides itself: no network, no scripts, no other files."""

import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from yxanul_nemo.report.style import Chart


@dataclass(frozen=True)
class Table:
    """A table of words; columns are aligned to the right unless they are in `left`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] = ()
    title: str = ""
    left: Collection[int] = (0,)
    wrap: Collection[int] = ()
    """Columns whose text may take several lines."""


@dataclass(frozen=True)
class Card:
    """One figure that the page begins with."""

    label: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    key: str
    title: str
    note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = field(default_factory=list)


def render(template: str, **values: Any) -> str:
    """The HTML of a page; all values are escaped."""
    environment = Environment(
        loader=PackageLoader("yxanul_nemo.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # The project's own file, and a style element decodes no entities.
    css = Markup(resources.files("yxanul_nemo.report").joinpath("templates", "style.css").read_text(encoding="utf-8"))
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(css=css, command=command, made=made, **values)
