"""Rules of the house that import-linter does not hold."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
PYPROJECTS = sorted(ROOT.glob("packages/*/pyproject.toml"))


def imported(path: Path) -> set[str]:
    """First parts of the names of all modules that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_source_never_imports_tests_or_tools():
    tests = {
        path.stem
        for path in [
            *ROOT.glob("packages/*/tests/**/*.py"),
            *ROOT.glob("packages/*/benchmarks/**/*.py"),
            *ROOT.glob("tests/*.py"),
        ]
    }
    forbidden = tests | {"tests", "benchmarks", "studies", "pytest", "hypothesis", "beartype"}
    assert {str(path): found for path in SOURCES if (found := imported(path) & forbidden)} == {}


def test_benchmarks_of_a_leaf_need_the_leaf_alone():
    """Packages keep timings of their own; what imports multicrafter to learn something is a study, in studies/."""
    found = ROOT.glob("packages/*/benchmarks/**/*.py")
    leaves = [p for p in found if "multicrafter" not in p.relative_to(ROOT).parts]  # the clone may be called so
    assert leaves and [p for p in leaves if imported(p) & {"multicrafter", "studies", "benchmarks"}] == []
    timings = ROOT.glob("packages/multicrafter/benchmarks/*.py")
    assert [p for p in timings if not p.name.startswith(("bench_", "results_"))] == []


def test_nothing_is_unpickled():
    for path in SOURCES:
        assert not imported(path) & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_no_module_is_called_utils_or_common():
    assert [p for p in SOURCES if {"utils", "common", "helpers"} & {p.stem, p.parent.name}] == []


def test_test_files_have_unique_names():
    names = Counter(p.name for p in [*ROOT.glob("packages/*/tests/**/test_*.py"), *ROOT.glob("tests/test_*.py")])
    assert [n for n, count in names.items() if count > 1] == []
    assert list(ROOT.glob("packages/*/tests/**/__init__.py")) == []


TOOLS = r"(pytest|hypothesis|beartype|mypy|ruff|coverage|import-linter|mkdocs|towncrier|twine|playwright|hatch|gradio|jupyter|ipykernel)\b.*"


def brought_along(names: set[str]) -> set[str]:
    """The packages and all that they ask for in this environment, without extras."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        found.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting |= {requirement.name} - found
    return found


def test_whoever_installs_a_package_gets_no_test_tool():
    distributions = {tomllib.loads(path.read_text())["project"]["name"] for path in PYPROJECTS}
    whole = brought_along(distributions)
    assert len(distributions) == 5 and {"torch", "jaxtyping", "markupsafe"} <= whole
    assert [name for name in sorted(whole) if re.match(TOOLS, name)] == []


@pytest.mark.parametrize("path", PYPROJECTS, ids=lambda p: p.parent.name)
def test_what_is_required_is_imported(path):
    """A requirement that nothing imports is a download for nothing."""
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    stated = {re.match(r"[\w-]+", line).group() for line in tomllib.loads(path.read_text())["project"]["dependencies"]}
    found = {name for source in path.parent.glob("src/**/*.py") for name in imported(source)}
    idle = {name for name in stated if modules.get(name, name.replace("-", "_")) not in found}
    assert idle - {"tensorboard"} == set(), "torch.utils.tensorboard imports that one"


@pytest.mark.parametrize("path", PYPROJECTS, ids=lambda p: p.parent.name)
def test_package_has_its_parts(path):
    """Version in one place, changelog ready for towncrier, typed, tested."""
    folder = path.parent
    settings = tomllib.loads(path.read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"]["path"] == f"src/{folder.name}/__init__.py"
    assert re.search(
        r'^__version__ = "\d+\.\d+\.\d+"$', (folder / "src" / folder.name / "__init__.py").read_text(), re.M
    )
    assert settings["tool"]["towncrier"]["start_string"].strip() in (folder / "CHANGELOG.md").read_text()
    assert settings["tool"]["towncrier"]["package"] == folder.name
    assert (folder / "src" / folder.name / "py.typed").exists()
    assert list(folder.glob("tests/**/test_*.py"))
    assert list(folder.glob("benchmarks/bench_*.py"))
    assert (folder / "README.md").read_text().strip()
    assert (ROOT / "docs" / "packages" / f"{folder.name}.md").exists()


def test_decisions_are_numbered_once():
    numbers = Counter(p.name[:4] for p in (ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert [n for n, count in numbers.items() if count > 1] == []
    for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"):
        for heading in ("Context", "Decision", "Evidence", "Consequences"):
            assert re.search(rf"^#+ {heading}|\*\*{heading}", path.read_text(), re.M), f"{path.name} lacks {heading}"


def test_decisions_named_in_the_source_exist():
    for path in SOURCES:
        for named in re.findall(r"docs/adr/(\d{4})", path.read_text()):
            assert list((ROOT / "docs" / "adr").glob(f"{named}-*.md")), (
                f"{path} names docs/adr/{named}, which does not exist"
            )
