"""What every page that a person looks at must hold: words for pictures, light and dark, a phone's width. For the tests of several rooms."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
PHONE = 390
VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags of a page, and whether they are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def check_page(path: Path) -> Page:
    """Raises where a page is not whole, hides a picture's meaning, needs another server, or does not follow light and dark."""
    text = path.read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert page.wrong == [] and [t for t in page.open if t not in ("li", "p")] == []
    assert ("html", {"lang": "en"}) in page.tags and names.count("h1") == names.count("title") == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        a for t, a in page.tags if t == "meta"
    ]
    assert {"name": "color-scheme", "content": "light dark"} in [a for t, a in page.tags if t == "meta"]
    assert re.search(r"@media \(prefers-color-scheme: dark\) *\{\s*:root *\{[^}]*--page", text)
    for tag, given in page.tags:
        if tag == "img":
            source = str(given["src"])
            assert len((given.get("alt") or "").split()) >= 2, f"a picture without words: {source[:60]}"
            assert source.startswith("data:image/") or (path.parent / source).is_file(), (
                f"no such picture: {source[:60]}"
            )
        assert not {"src", "href"} & given.keys() or not str(given.get("src", given.get("href"))).startswith(
            ("http", "//")
        )
    return page


def overflow(path: Path, folder: Path, width: int = PHONE) -> int:
    """Pixels by which a page is wider than a phone, in Chromium; tables and charts may scroll by themselves."""
    frame = folder / "frame.html"
    frame.write_text(
        f'<!doctype html><title>-</title><iframe id="f" width="{width}" height="800" style="border:0" src="{path.resolve().as_uri()}"></iframe>'
        "<script>f.onload = () => { const e = f.contentDocument.documentElement;"
        ' document.title = "over " + (e.scrollWidth - e.clientWidth) }</script>'
    )
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>over (-?\d+)</title>", said)
    assert found, said[:500]
    return int(found.group(1))
