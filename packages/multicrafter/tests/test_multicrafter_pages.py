"""One base for all HTML pages: nothing unescaped, no class without a style, no picture without words; files that appear whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import multicrafter
import pytest
from multicrafter import files, pages
from multicrafter.demo.report import BETTER, write_report
from multicrafter.pages import Cell, render
from multicrafter.scoring.evaluate import METRICS
from multicrafter_looks import check_page, needs_chromium, overflow
from PIL import Image

ROOMS = Path(multicrafter.__file__).parent
TEMPLATES = sorted(p for p in ROOMS.glob("*/*.html") if p.parent.name != "pages")


def test_every_room_builds_on_the_base():
    assert {p.parent.name for p in TEMPLATES} == {"cli", "demo", "scoring", "photos"}
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
    marks = {"sure", "worse", "unsure", "best", "text"}
    assert {name for name in used | marks if f".{name}" not in style} == set()


def light(colour: str) -> float:
    """Relative luminance of ``#rgb`` or ``#rrggbb``, WCAG 2.2."""
    digits = colour.strip("#") if len(colour) == 7 else "".join(2 * c for c in colour.strip("#"))
    red, green, blue = (
        (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4) for v in (b / 255 for b in bytes.fromhex(digits))
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_word_can_be_read_in_light_and_dark():
    """4.5 to 1, the bound of WCAG 2.2 (AA): also the small grey intervals on green, red and yellow."""
    schemes = re.findall(r":root \{ (--page[^}]*)\}", (ROOMS / "pages" / "base.html").read_text())
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w+);", scheme))
        for ground in ("page", "good", "bad", "note"):
            for text in ("text", "faint"):
                low, high = sorted((light(colours[text]), light(colours[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground, colours)


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


def test_the_demo_marks_better_and_worse_by_metric_where_an_interval_excludes_zero(tmp_path):
    up, unsure = {"mean": 0.2, "low": 0.1, "high": 0.3}, {"mean": 0.1, "low": -0.1, "high": 0.3}
    down, unknown = {"mean": -0.2, "low": -0.3, "high": -0.1}, {"mean": None, "low": None, "high": None}
    results = {
        "summary": {"baseline": {"swaps": up}, "stage 1": {"swaps": unsure, "reward": up}},
        "differences": {
            "stage 1 - baseline": {"swaps": down, "identity": up, "text": unsure, "found": unknown},
            "stage 2 - stage 1": {"swaps": up, "identity": down, "swaps_by_chance": down},
        },
        "claims": {"a < b": {"holds": True}, "c": {"holds": False}},
        "metrics": {"swaps": "attributes <swapped>"}, "judges": {"clip": 1}, "seconds": {"total": 12.0},
        "config": {"seed": 3, "cases": 7},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "reward.png").write_bytes(b"png")
    page = write_report(tmp_path).read_text()
    for kind, text, ends in (
        ("sure", "-0.20", "[-0.30, -0.10] better"), ("sure", "+0.20", "[+0.10, +0.30] better"),
        ("worse", "+0.20", "[+0.10, +0.30] worse"), ("worse", "-0.20", "[-0.30, -0.10] worse"),
        ("unsure", "+0.10", "[-0.10, +0.30]"), ("unsure", "–", "[–, –]"),
    ):  # fmt: skip
        assert page.count(f'<td class="{kind}">{text} <span class="range">{ends}</span></td>') == 1, (kind, text)
    assert "<td>-0.20 " in page, "what guessing gives is neither better nor worse"
    assert page.count('<td>0.20 <span class="range">[0.10, 0.30]</span></td>') == 2, "of one model nothing is marked"
    assert '<td class="sure">a &lt; b</td>' in page and '<td class="unsure">c</td>' in page
    assert "attributes &lt;swapped&gt;" in page and "seed 3" in page and "12 s of compute" in page
    assert page.count("<img") == 1 and pages.embedded(b"png") in page


def test_of_every_metric_it_is_known_what_is_better():
    assert set(METRICS) - set(BETTER) == {"swaps_by_chance"}


@pytest.fixture
def demo(tmp_path):
    """The report of a demo with every figure that it may have, and numbers of the usual width."""
    found = {"mean": -0.1234, "low": -0.2345, "high": -0.0123}
    names = ("identity", "attributes", "swaps_above_chance", "aesthetics")
    models = ("baseline", "stage 1", "stage 2")
    results = {
        "summary": {model: dict.fromkeys(names, found) for model in models},
        "differences": {f"{b} - {a}": dict.fromkeys(names, found) for a, b in zip(models, models[1:], strict=False)},
        "claims": {"The method shows people more like their references than plain LoRA (identity)": {"holds": False}},
        "metrics": dict.fromkeys(names, "what it is"), "judges": {"people": {"same_cosine": 0.9475, "path": "x" * 90}},
        "seconds": {"total": 512.0}, "config": {"seed": 3, "cases": 7},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    for name in ("side_by_side", "pictures", "attention", "training", "reward"):
        Image.new("RGB", (1200, 500)).save(tmp_path / f"{name}.png")
    return write_report(tmp_path)


def test_the_demo_opens_with_the_side_by_side_picture(demo):
    page, text = check_page(demo), demo.read_text()
    assert sum(tag == "img" for tag, _ in page.tags) == 5
    opening = text.index("by the method from the same noise")
    assert text.index("<h1>") < text.index("<b>Without</b>") < opening < text.index("<h2>")
    assert text.count('class="chart"') == 2, "figures with axes scroll on a phone instead of shrinking"
    unnamed = text.replace('alt="A grid', 'alt="" title="A grid')
    demo.write_text(unnamed)
    with pytest.raises(AssertionError, match="without words"):
        check_page(demo)


@needs_chromium
def test_the_demo_fits_a_phone(demo, tmp_path):
    assert overflow(demo, tmp_path) == 0
    wide = tmp_path / "wide.html"
    wide.write_text(demo.read_text().replace('<div class="wide">', "<div>"))
    assert overflow(wide, tmp_path) > 0, "the measure sees what is too wide"


def test_names_in_the_head_of_a_table_may_break_but_stay_escaped(tmp_path):
    (tmp_path / "t.html").write_text(
        '{% extends "base.html" %}{% import "parts.html" as parts %}{% block content %}{{ parts.table(head, []) }}{% endblock %}'
    )
    page = render(tmp_path, "t.html", title="t", head=["swaps_<b>"])
    assert "<th>swaps_<wbr>&lt;b&gt;</th>" in page and 'class="many"' not in page
    assert 'class="many"' in render(tmp_path, "t.html", title="t", head=["x"] * 7)


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
