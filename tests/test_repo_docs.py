"""What the site names exists, and what exists is named: symbols of the paper map, public names in the API, decisions in their list."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path

import griffe
import pytest
import yaml
from test_repo_public_names import public_names

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
SYMBOL = re.compile(rf"^(?:{'|'.join(PACKAGES)})(?:\.\w+)+$")
PLACES = [
    "idar.loss.dice",
    "gspo.ratio.sequence_importance_ratio",
    "gspo.sde.FlowSDE.step",
    "id_reward.alignment.multi_id_alignment_reward",
    "moe_lora.routing.route",
    "multicrafter.models.flux.model.predict_velocity",
]


@functools.cache
def source(package: str) -> griffe.Module:
    """A package as its source says it, without importing it."""
    return griffe.load(package, search_paths=[ROOT / "packages" / package / "src"], resolve_aliases=True)


def find(symbol: str) -> griffe.Object | None:
    """The object of a full name; the lazy names of multicrafter's root are those that it lists."""
    package, *rest = symbol.split(".")
    found: griffe.Object = source(package)
    for part in rest:
        if part not in found.all_members:
            return None
        found = found.all_members[part]
        if found.is_alias and found.resolved:
            found = found.final_target
    return found


def symbols(path: Path) -> list[str]:
    """Full names in code, arguments left out."""
    code = [c.partition("(")[0] for c in re.findall(r"`([^`\n]+)`", path.read_text())]
    return [c for c in code if SYMBOL.match(c)]


@pytest.mark.parametrize("path", sorted((DOCS / "paper_map").glob("*.md")), ids=lambda p: p.stem)
def test_symbols_of_the_paper_map_exist(path):
    named = symbols(path)
    assert len(named) >= 6
    assert [symbol for symbol in named if find(symbol) is None] == []


def test_a_symbol_that_is_not_there_is_noticed():
    assert (
        find("idar.loss.dices") is None and find("gspo.sde.FlowSDE.steps") is None and find("idar.nowhere.dice") is None
    )
    assert find("idar.idar_loss").path == "idar.loss.idar_loss"


def test_the_six_places_are_named_first_and_say_their_equation():
    assert symbols(DOCS / "paper_map" / "index.md") == PLACES
    places = [find(symbol) for symbol in PLACES]
    assert [p.path for p in places if not isinstance(p, griffe.Function) or p.docstring is None] == []


def shown(path: Path) -> dict[str, list[str] | None]:
    """What a page of the API shows by module or object: names, or None for all that are public."""
    found = {}
    for name, options in re.findall(r"^::: ([\w.]+)\n(?:    options: (\{.*\})\n)?", path.read_text(), re.M):
        found[name] = (yaml.safe_load(options) if options else {}).get("members")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_api_shows_every_public_name(package):
    page = shown(DOCS / "api" / f"{package}.md")
    names = {f"{module}.{name}" for module, members in page.items() for name in members or ()} | page.keys()
    assert [name for name in names if find(name) is None] == []
    if package == "multicrafter":  # its root is lazy: names are shown where they are defined
        assert {name.rpartition(".")[2] for name in names} >= set(public_names()["multicrafter"])
    else:
        assert page[package] is None, "the root is shown with all of its names"
    kept = json.loads((ROOT / "tests" / "public_names.json").read_text())
    needed = {name for m in kept if m.startswith(f"{package}.integrations.") for name in kept[m]}
    here = {name.rpartition(".")[2] for name in names} | set(public_names()[package])
    assert needed - here == set(), f"name them in docs/api/{package}.md"


@pytest.mark.parametrize("package", [p for p in PACKAGES if p != "multicrafter"])
def test_public_names_have_a_docstring_to_show(package):
    """mkdocstrings leaves out what has none."""
    names = [find(f"{package}.{name}") for name in public_names()[package]]
    bare = [n.path for n in names if isinstance(n, (griffe.Function, griffe.Class)) and not n.has_docstring]
    assert bare == []


def test_every_decision_is_in_the_list_and_short():
    listed = (DOCS / "adr" / "index.md").read_text()
    decisions = sorted((DOCS / "adr").glob("0*.md"))
    assert [p.name for p in decisions if f"]({p.name})" not in listed] == []
    parts = ("**Context.**", "**Decision.**", "**Evidence.**", "**Consequences.**")
    assert [p.name for p in decisions if any(part not in p.read_text() for part in parts)] == []
    assert [p.name for p in decisions if len(p.read_text().split()) > 340] == [], "a decision is half a page"


def test_the_nav_names_pages_that_exist_once():
    class Loader(yaml.SafeLoader):
        """Reads what is there; mkdocs' own tags are strings."""

    Loader.add_multi_constructor("!", lambda loader, tag, node: str(node))
    nav = json.dumps(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    pages = re.findall(r"[\w/]+\.md", nav)
    assert len(pages) == len(set(pages))
    assert [page for page in pages if not (DOCS / page).is_file()] == []


def test_examples_in_docstrings_become_code():
    spec = importlib.util.spec_from_file_location("griffe_examples", DOCS / "griffe_examples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Doubles.\n\nArgs:\n    x: A number.\n\n>>> double(2)\n4\n\n>>> double(3)\n6"
    parsed = griffe.Docstring(module.with_headings(text)).parse("google")
    assert [s.kind.value for s in parsed] == ["text", "parameters", "examples"]
    assert [value for _, value in parsed[-1].value] == [">>> double(2)\n4", ">>> double(3)\n6"]
    assert module.with_headings("Says >>> nothing.\n    >>> indented") == "Says >>> nothing.\n    >>> indented"
