"""HTML pages: one base template, light and dark, for screens of every width; each room has the templates of its own pages."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Cell(NamedTuple):
    """A cell of a table: its text, small text after it, and how it is marked ("sure", "worse", "unsure", "best", "text" or "")."""

    text: str
    range: str = ""
    kind: str = ""


def number(value: float | None, places: int = 2, *, sign: bool = False) -> str:
    """A number with its decimals, or a dash for what is not known; zero has no minus, except where signs are asked for.

    >>> number(0.12345), number(-0.001), number(float("nan")), number(None)
    ('0.12', '0.00', '–', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:{'+' if sign else 'z'}.{places}f}"


def interval(mean: float | None, low: float | None, high: float | None, kind: str = "", *, sign: bool = False) -> Cell:
    """A mean with its interval, to a third or fourth decimal where the interval is so narrow that two would hide it.

    Args:
        mean: None where it is not known, as are the others.
        low: End of the interval.
        high: Its other end.
        kind: See `Cell`.
        sign: Of a difference, which shows a plus.

    >>> interval(0.5, 0.25, 0.75)
    Cell(text='0.50', range='[0.25, 0.75]', kind='')
    >>> interval(0.0042, 0.0021, 0.0063, sign=True)
    Cell(text='+0.004', range='[+0.002, +0.006]', kind='')
    """
    width = 1.0 if low is None or high is None else (high - low) or 1.0
    places = next((n for n in (2, 3) if not width < 2 * 10**-n), 4)
    mean_text, low_text, high_text = (number(x, places, sign=sign) for x in (mean, low, high))
    return Cell(mean_text, f"[{low_text}, {high_text}]", kind)


def difference(mean: float | None, low: float | None, high: float | None, *, better: str | None) -> Cell:
    """A difference with its interval, marked and said to be better or worse where the interval excludes 0.

    Args:
        mean: See `interval`, as are the others.
        low: End of the interval.
        high: Its other end.
        better: "more" or "less"; None where neither is.

    >>> difference(-0.2, -0.3, -0.1, better="less")
    Cell(text='-0.20', range='[-0.30, -0.10] better', kind='sure')
    >>> difference(0.1, -0.1, 0.3, better="more").kind
    'unsure'
    """
    cell = interval(mean, low, high, sign=True)
    if low is None or high is None or not (low > 0 or high < 0):
        return cell._replace(kind="unsure")
    if better is None:
        return cell
    gain = (low > 0) == (better == "more")
    return Cell(cell.text, f"{cell.range} {'better' if gain else 'worse'}", "sure" if gain else "worse")


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
