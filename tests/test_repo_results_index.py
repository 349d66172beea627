"""The list of results has every page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_page_of_results_is_in_the_list():
    pages = ROOT / "docs" / "results"
    listed = (pages / "index.md").read_text()
    lacking = [p.name for p in pages.glob("*.md") if p.stem != "index" and f"]({p.name})" not in listed]
    assert lacking == [], "run python studies/lab/results_index.py"
    spec = importlib.util.spec_from_file_location("results_index", ROOT / "studies" / "lab" / "results_index.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert all(f"]({p.name})" in made.index() for p in pages.glob("*.md") if p.stem != "index")
