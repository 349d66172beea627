"""The pages of an evaluation, a comparison and a leaderboard, as a person sees them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from multicrafter.scoring.leaderboard import compare_runs, leaderboard
from multicrafter.scoring.pages import compare_page, leaderboard_page, run_page

sys.path.insert(0, str(Path(__file__).parent.parent))
from multicrafter_looks import check_page, needs_chromium, overflow


@pytest.fixture(scope="module")
def pages(scored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    right, wrong = scored["right"], scored["wrong"]
    board = leaderboard([right, wrong])
    texts = {
        "run": run_page(right),
        "compare": compare_page(wrong, right, *compare_runs(wrong, right)),
        "board": leaderboard_page("All runs", board.rows, board.names, board.notes),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["run", "compare", "board"])
def test_pages_are_whole_with_words_for_pictures_in_light_and_dark(pages, name):
    page = check_page(pages / f"{name}.html")
    pictures = [given for tag, given in page.tags if tag == "img"]
    assert len(pictures) == (2 * 6 * 3 if name == "run" else 0)
    assert len({p["alt"] for p in pictures}) == (6 * 3 if name == "run" else 0), "each picture has words of its own"


@needs_chromium
@pytest.mark.parametrize("name", ["run", "compare", "board"])
def test_pages_fit_a_phone(pages, tmp_path, name):
    assert overflow(pages / f"{name}.html", tmp_path) == 0
