"""Every notebook runs from top to bottom and shows what it promises; what is stored in it was made so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PACKAGES = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}


def cells(path: Path) -> list[nbformat.NotebookNode]:
    """Those with code."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def pictures(cell: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_there_is_one_for_each_package():
    assert {path.stem for path in NOTEBOOKS} == PACKAGES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_small_and_its_first_cell_installs_it(path):
    """Nothing of ours but its package is imported, and what is stored has pictures, in order, without errors."""
    code = cells(path)
    assert path.stat().st_size < 0.5e6
    distribution = path.stem.replace("_", "-")
    assert re.search(rf'"pip", "install", "-q", "{distribution}\b', code[0].source)
    source = "\n".join(re.sub(r"^%.*$", "", cell.source, flags=re.M) for cell in code)
    roots = {m.split(".")[0] for node in ast.walk(ast.parse(source)) for m in imported(node)}
    assert path.stem in roots and not roots & (PACKAGES - {path.stem})
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(map(pictures, code)) >= 1
    assert {output.output_type for cell in code for output in cell.outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }


def imported(node: ast.AST) -> list[str]:
    """Modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path):
    """In a folder of its own; each picture that is stored appears again."""
    stored = [pictures(cell) for cell in cells(path)]
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert [pictures(cell) for cell in notebook.cells if cell.cell_type == "code"] == stored
    said = "".join(o.text for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "stream")
    assert "False" not in said, "what a notebook checks holds"
