"""HTML pages: one base template, light and dark, for screens of every width; each room has the templates of its own pages."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Cell(NamedTuple):
    """A cell of a table: its text, small text after it, and how it is marked ("sure", "worse", "best", "text" or "")."""

    text: str
    range: str = ""
    kind: str = ""


def number(value: float | None) -> str:
    """Three decimals, or a dash for what is not known.

    >>> number(0.12345), number(float("nan")), number(None)
    ('0.123', '–', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def interval(mean: float | None, low: float | None, high: float | None, kind: str = "") -> Cell:
    """A mean with its interval.

    >>> interval(0.5, 0.25, 0.75)
    Cell(text='0.500', range='[0.250, 0.750]', kind='')
    """
    return Cell(number(mean), f"[{number(low)}, {number(high)}]", kind)


def embedded(picture: bytes, kind: str = "png") -> str:
    """A picture's bytes as an address that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def render(folder: Path, name: str, **values: Any) -> str:
    """A page from the template ``folder/name``, which extends ``base.html`` of this room; whatever is filled in is escaped.

    A value that a template asks for and that is missing raises, instead of leaving a hole.
    """
    import jinja2

    loader = jinja2.FileSystemLoader([folder, HERE])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**values) + "\n"
