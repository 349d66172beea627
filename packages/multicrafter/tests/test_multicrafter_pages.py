"""One base for all HTML pages: nothing unescaped, no class without a style, no picture without words; files that appear whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import multicrafter
import pytest
from multicrafter import files, pages
from multicrafter.demo.report import write_report
from multicrafter.pages import Cell, render

ROOMS = Path(multicrafter.__file__).parent
TEMPLATES = sorted(p for p in ROOMS.glob("*/*.html") if p.parent.name != "pages")


def test_every_room_builds_on_the_base():
    assert {p.parent.name for p in TEMPLATES} == {"demo", "scoring", "photos"}
    for template in TEMPLATES:
        text = template.read_text()
        assert text.startswith('{% extends "base.html" %}') and "<style" not in text
    written = [p for p in ROOMS.rglob("*.py") if "<html" in (text := p.read_text()) or "<style" in text]
    assert written == [], "pages are templates"


def test_every_class_has_a_style():
    style = (ROOMS / "pages" / "base.html").read_text()
    used = {
        name
        for p in [*TEMPLATES, ROOMS / "pages" / "parts.html"]
        for name in re.findall(r'class="(\w+)"', p.read_text())
    }
    marks = {"sure", "worse", "best", "text"}
    assert {name for name in used | marks if f".{name}" not in style} == set()


def test_every_picture_has_words():
    for template in TEMPLATES:
        for tag in re.findall(r"<img[^>]*>", template.read_text()):
            assert re.search(r'alt="[^"]+"', tag), tag


def test_what_is_filled_in_is_escaped_and_nothing_is_left_out(tmp_path):
    (tmp_path / "t.html").write_text(
        '{% extends "base.html" %}{% import "parts.html" as parts %}{% block content %}'
        "{{ parts.table(head, rows) }}{{ parts.notes(notes) }}{% endblock %}"
    )
    row = ["<b>", 3, Cell("0.5", "[<0, 1]", "sure")]
    values = {"title": "A & B", "head": ["<h>", "n", "x"], "rows": [row], "notes": ["<script>"]}
    page = render(tmp_path, "t.html", **values)
    assert "<title>A &amp; B</title>" in page and "<h1>A &amp; B</h1>" in page
    assert "<td>&lt;b&gt;</td>" in page and "<td>3</td>" in page and "<th>&lt;h&gt;</th>" in page
    assert '<td class="sure">0.5 <span class="range">[&lt;0, 1]</span></td>' in page
    assert "<script>" not in page and '<p class="note">&lt;script&gt;</p>' in page
    assert page.startswith('<!doctype html>\n<html lang="en">') and "width=device-width" in page and "dark" in page
    with pytest.raises(jinja2.UndefinedError, match="notes"):
        render(tmp_path, "t.html", **{k: v for k, v in values.items() if k != "notes"})


def test_the_demo_marks_differences_that_exclude_zero(tmp_path):
    sure, unsure = {"mean": 0.2, "low": 0.1, "high": 0.3}, {"mean": 0.1, "low": -0.1, "high": 0.3}
    results = {
        "summary": {"baseline": {"swaps": sure}, "stage 1": {"swaps": unsure, "reward": sure}},
        "differences": {"stage 1 - baseline": {"swaps": sure, "text": unsure}},
        "claims": {"a < b": {"holds": True}, "c": {"holds": False}},
        "metrics": {"swaps": "attributes <swapped>"}, "judges": {"clip": 1}, "seconds": {"total": 12.0},
        "config": {"seed": 3, "cases": 7},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "reward.png").write_bytes(b"png")
    page = write_report(tmp_path).read_text()
    assert page.count('<td class="sure">0.200 <span class="range">[0.100, 0.300]</span></td>') == 1
    assert '<td class="sure">a &lt; b</td>' in page and '<td class="worse">c</td>' in page
    assert "attributes &lt;swapped&gt;" in page and "seed 3" in page and "12 s of compute" in page
    assert page.count("<img") == 1 and pages.embedded(b"png") in page


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "a.png"
    with files.appearing(target) as temporary:
        assert temporary.suffix == ".png" and not target.exists()
        temporary.write_bytes(b"one")
    assert target.read_bytes() == b"one"

    def breaks() -> None:
        with files.appearing(target, sync=True) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        breaks()
    assert target.read_bytes() == b"one" and [p.name for p in target.parent.iterdir()] == ["a.png"]
    files.write_whole(target, "two", sync=True)
    assert target.read_text() == "two"
