"""Text in pictures: the comparison by hand, Florence-2 on a tiny checkpoint, and rapidocr on drawn text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from id_reward import CompositeReward
from id_reward.backends.ocr import FlorenceReader, OCRScorer, RapidReader, edit_distance, text_score, wanted_text


def slow_edit_distance(a: str, b: str) -> int:
    """The recursion, written out."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_edit_distance(a[1:], b) + 1,
        slow_edit_distance(a, b[1:]) + 1,
        slow_edit_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@given(st.text("abé😀", max_size=6), st.text("abé😀", max_size=6))
@settings(deadline=None, max_examples=80)
def test_the_edit_distance_is_that_of_the_recursion(a, b) -> None:
    assert edit_distance(a, b) == slow_edit_distance(a, b)


@pytest.mark.parametrize(("prompt", "expected"), [
    ('a sign that says "Open" above "Late"', "Open Late"), ("a sign that says “Öffnet”", "Öffnet"), ("«Fermé»", "Fermé"), ("stop", "stop"),
    ("a shop called 'Anna' at night", "Anna"), ("it isn't Ben's", "it isn't Ben's"), ("„Halt“ und „Los“", "Halt Los"),
])  # fmt: skip
def test_what_is_wanted_stands_in_quotation_marks(prompt, expected) -> None:
    assert wanted_text(prompt) == expected


def test_scores_by_hand() -> None:
    assert text_score("abcd", "abce") == 0.75 and text_score("xyz", "ab") == 0 and text_score("A B\nC", "abc") == 1
    assert text_score("long text that holds EXIT somewhere", "exit") == 1
    assert np.isnan(text_score("x", "  "))
    scorer = OCRScorer(lambda images: ["open", "oben", ""])
    found = scorer([0, 0, 0], ['"open"'] * 3, [[]] * 3)
    np.testing.assert_allclose(found, [1, 0.75, 0])
    assert CompositeReward({"text": (scorer, 2.0)})([0] * 3, ['"open"'] * 3, [[]] * 3).totals.tolist() == [2, 1.5, 0]
    assert scorer([], [], []).shape == (0,) and scorer.to("cpu") is scorer
    with pytest.raises(ValueError, match="one text per picture"):
        scorer([0], ["x"], [[]])
    with pytest.raises(ValueError, match="one entry per picture"):
        scorer([0], [], [])
    with pytest.raises(ValueError, match="functions"):
        OCRScorer("reader")  # type: ignore[arg-type]


def test_florence_reads(tmp_path) -> None:
    pytest.importorskip("torch", reason="needs id-reward[objects]")
    pytest.importorskip("transformers", reason="needs id-reward[objects]")
    from id_reward.backends.objects import FlorenceLocator
    from PIL import Image
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    spec = importlib.util.spec_from_file_location("tiny_checkpoints", Path(__file__).with_name("tiny_checkpoints.py"))
    assert spec and spec.loader
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tiny.florence(tmp_path / "florence")
    locator = FlorenceLocator(
        Florence2ForConditionalGeneration.from_pretrained(folder),
        Florence2Processor.from_pretrained(folder),
        max_new_tokens=6,
    )
    reader = FlorenceReader(locator)
    texts = reader([Image.new("RGB", (32, 32)), np.zeros((8, 8, 3))])
    assert len(texts) == 2 and all(isinstance(t, str) and "<s>" not in t for t in texts)
    locator.generate = lambda images, queries: [f"</s><s>OPEN{q}</s>".replace("<OCR>", "") for q in queries]  # type: ignore[method-assign]
    assert OCRScorer(reader)([Image.new("RGB", (32, 32))], ['"open"'], [[]]).tolist() == [1]
    assert reader.to("cpu") is reader


def test_rapidocr_reads_drawn_text() -> None:
    pytest.importorskip("rapidocr", reason="needs id-reward[ocr]")
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (420, 120), "white")
    ImageDraw.Draw(picture).text((20, 30), "OPEN LATE", fill="black", font=ImageFont.load_default(size=56))
    scorer = OCRScorer(RapidReader())
    found = scorer([picture, Image.new("RGB", (200, 100), "white")], ['a sign "Open late"'] * 2, [[]] * 2)
    assert found[0] > 0.85 and found[1] == 0


def test_without_rapidocr_the_pip_line_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r'pip install "id-reward\[ocr\]"'):
        RapidReader()
