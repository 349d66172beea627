"""What the source promises about itself: no circles of imports, also not inside functions, and nothing is unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import id_reward
import pytest

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


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_shapes_are_jaxtypings_where_somebody_looks_at_them() -> None:
    """Importing it costs more than everything else, so it is only there for type checkers and for its own import hook."""
    hints = "from typing import get_type_hints; from id_reward import match; print(get_type_hints(match)['similarity'])"
    assert run(hints) == "<class 'numpy.ndarray'>"
    assert "Float[ndarray, 'r f']" in run(f"import jaxtyping; {hints}")


def test_the_import_hook_checks_shapes() -> None:
    pytest.importorskip("beartype", reason="needs beartype")
    code = """
import jaxtyping, numpy as np
with jaxtyping.install_import_hook("id_reward", "beartype.beartype"):
    import id_reward
assert id_reward.multi_id_alignment_reward(np.eye(2), np.eye(3, 2)).reward == 1
try:
    id_reward.match(np.zeros(3))
except jaxtyping.TypeCheckError:
    print("checked")
"""
    assert run(code) == "checked"


def test_the_core_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'PIL', 'dlib', 'cv2', 'transformers', 'onnxruntime', 'scipy', 'jaxtyping', 'concurrent', 'http'}"
    code = f"import sys, id_reward; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
