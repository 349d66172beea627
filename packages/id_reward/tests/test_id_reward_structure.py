"""What the source promises about itself: no circles of imports, also not inside functions, and nothing is unpickled."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import id_reward

SOURCE = Path(id_reward.__file__).parent


def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = ["id_reward", *file.relative_to(SOURCE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    return found


def arrows(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return names & known


def test_no_circles() -> None:
    trees = modules()
    graph = {name: arrows(tree, set(trees)) for name, tree in trees.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(trees)


def test_nothing_is_unpickled() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("pickle.loads", "pickle.load", "pickle.Unpickler", "joblib.load"), name
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), name
