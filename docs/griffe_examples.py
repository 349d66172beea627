"""Lets the API pages show doctests as code: our docstrings have no heading over them, and griffe wants one."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*(?:\n\n>>> .*(?:\n.+)*)*", re.M)


def with_headings(text: str) -> str:
    r"""Puts "Examples:" over every run of examples, and indents the run.

    >>> print(with_headings("Doubles.\n\n>>> double(2)\n4"))
    Doubles.
    <BLANKLINE>
    Examples:
        >>> double(2)
        4
    """
    return EXAMPLE.sub(lambda run: "Examples:\n" + re.sub("^(?=.)", "    ", run[0], flags=re.M), text)


class Examples(griffe.Extension):
    """Changes the docstring of everything that has one."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = with_headings(obj.docstring.value)
