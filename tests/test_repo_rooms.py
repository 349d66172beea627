"""The rooms of multicrafter stand on floors, and imports go down: counted from the source, lazy imports and annotations included.

``python tests/test_repo_rooms.py`` prints the arrows.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "packages" / "multicrafter" / "src"
FLOORS = {
    "files": 0,
    "pages": 0,
    "models": 1,
    "pipeline": 2,
    "world": 2,
    "photos": 3,
    "training": 4,
    "scoring": 5,
    "config": 6,
    "plan": 7,
    "demo": 7,
    "cli": 8,
}
FRONT_DOOR = ("", "__main__")  # the package itself: its version, its public names, its old ones
MOST_ROOMS, MOST_ARROWS = 13, 45

Arrows = Mapping[tuple[str, str], Iterable[str]]


def modules(source: Path) -> dict[str, Path]:
    """File of each module of multicrafter, by its name without ``multicrafter``; "" is the package."""
    found = {}
    for path in sorted(source.glob("multicrafter/**/*.py")):
        parts = path.relative_to(source / "multicrafter").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Iterable[str]) -> set[str]:
    """The modules among ``known`` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = [n for alias in node.names for n in (f"{node.module}.{alias.name}", str(node.module))]
        else:
            continue
        inside = [n.removeprefix("multicrafter").lstrip(".") for n in names if n.split(".")[0] == "multicrafter"]
        if isinstance(node, ast.ImportFrom):  # a submodule counts, not also the package it is taken from
            inside = [sub if sub in known else package for sub, package in zip(inside[::2], inside[1::2], strict=True)]
        found |= set(inside)
    return found & set(known)


def room(module: str) -> str:
    """The folder or file right below multicrafter."""
    return module.split(".")[0]


def graph(source: Path) -> dict[str, set[str]]:
    """What each module imports."""
    known = modules(source)
    return {name: imported(path, known) - {name} for name, path in known.items()}


def arrows(imports: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], list[str]]:
    """Room, room it imports -> by which modules; the front door is no room."""
    found = defaultdict(list)
    for name, targets in imports.items():
        for target in targets:
            pair = room(name), room(target)
            if pair[0] != pair[1] and not {*pair} & {*FRONT_DOOR}:
                found[pair].append(f"{name} -> {target}")
    return dict(found)


def upward(found: Arrows) -> list[str]:
    """Imports that do not lead to a lower floor."""
    return sorted(i for (a, b), names in found.items() if FLOORS[b] >= FLOORS[a] for i in names)


def circle(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules that import each other in a circle, or nothing."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for target in sorted(imports[name]):
            if found := visit(target):
                return found
        done.add(path.pop())
        return []

    return next((found for name in sorted(imports) if (found := visit(name))), [])


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return graph(SOURCE)


def test_every_room_has_its_floor(imports):
    rooms = {room(name) for name in imports} - {*FRONT_DOOR}
    assert rooms == set(FLOORS)
    assert len(rooms) <= MOST_ROOMS


def test_arrows_are_few_and_none_leads_up(imports):
    found = arrows(imports)
    assert upward(found) == []
    assert len(found) <= MOST_ARROWS, sorted(found)


def test_no_module_imports_itself_through_others(imports):
    assert circle(imports) == []


def test_the_front_door_opens_on_nothing(imports):
    """The package must import fast, and every room may read its version."""
    assert imports[""] == set()


def test_import_linter_holds_the_same_floors():
    import tomllib

    settings = tomllib.loads((SOURCE.parents[2] / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [c for c in settings["contracts"] if c["type"] == "layers" and c["containers"] == ["multicrafter"]]
    floors = [{name.strip() for name in layer.split(":")} for layer in reversed(contract["layers"])]
    assert floors == [{r for r, f in FLOORS.items() if f == floor} for floor in sorted({*FLOORS.values()})]


def test_what_is_wrong_is_seen(tmp_path):
    package = tmp_path / "multicrafter"
    for name, text in {
        "files": "",
        "models/__init__": "def f():\n    from multicrafter.cli import main",
        "models/a": "from multicrafter.models import b\nimport multicrafter.files",
        "models/b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from multicrafter.models.a import x",
        "cli/__init__": "from multicrafter.models import a\nfrom multicrafter import __version__",
        "__init__": "",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    made = graph(tmp_path)
    assert made["cli"] == {"models.a", ""}
    assert set(arrows(made)) == {("models", "cli"), ("models", "files"), ("cli", "models")}
    assert upward(arrows(made)) == ["models -> cli"]
    assert circle(made) == ["models.a", "models.b", "models.a"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


if __name__ == "__main__":
    counted = arrows(graph(SOURCE))
    for pair in sorted(counted, key=lambda p: (-FLOORS[p[0]], p)):
        print(f"{pair[0]:9} -> {pair[1]:9} {len(list(counted[pair]))} imports")
    print(f"{len(FLOORS)} rooms, {len(counted)} arrows")
