"""What the documents promise exists: commands, snippets, links."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import snippets

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()


def name(path: Path) -> str:
    """The document's path in the repository."""
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[str]:
    """Python blocks of a document; one after the comment ``<!-- not run: reason -->`` is left out."""
    text = re.sub(r"<!-- not run: [^>]+-->\s*```python\n.*?^```", "", path.read_text(), flags=re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.fixture(scope="module")
def interpreter():
    running = snippets.Interpreter()
    yield running
    running.close()


@pytest.mark.parametrize("path", [d for d in DOCUMENTS if blocks(d)], ids=name)
def test_snippets_run(path, interpreter, tmp_path):
    """All blocks of a document, one after the other, in an empty folder."""
    code, errors = interpreter.run("\n".join(blocks(path)), tmp_path)
    assert code == 0, errors


def test_snippets_that_fail_are_noticed(interpreter, tmp_path):
    """And one does not see the names of another."""
    assert interpreter.run("x = 1; open('left', 'w').write('x')", tmp_path) == (0, "")
    assert (tmp_path / "left").read_text() == "x"
    code, errors = interpreter.run("print(x)", tmp_path)
    assert code == 1 and "NameError" in errors and "<document>" in errors
    assert interpreter.run("raise SystemExit(3)", tmp_path)[0] == 3
    assert interpreter.run("import gspo.missing", tmp_path)[0] == 1
    assert interpreter.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)[0] == -9


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md"], ids=name)
def test_make_targets_exist(path):
    targets = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M).group(1).split())
    named = {
        t for line in re.findall(r"(?:`|^    |^)make ([a-z -]+)", path.read_text(), re.M) for t in line.split()[:1]
    }
    assert named <= targets


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md"], ids=name)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if not re.match(r"\w+:", link) and not (path.parent / link).exists()]
    assert missing == []


def test_readme_starts_with_the_two_commands():
    assert re.search(r"^    make demo$\n^    make test$", (ROOT / "README.md").read_text(), re.M)


def test_readme_has_every_package():
    text = (ROOT / "README.md").read_text()
    for pyproject in ROOT.glob("packages/*/pyproject.toml"):
        distribution = tomllib.loads(pyproject.read_text())["project"]["name"]
        assert f"packages/{pyproject.parent.name}" in text
        assert re.search(rf"pip install [\"']?{distribution}\b", text), distribution


def test_ci_runs_exactly_check_and_test():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make check", "make test"]


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^make ([a-z-]+)", done.stdout, re.M))
    assert listed == set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M).group(1).split()) - {"environment", "help"}
