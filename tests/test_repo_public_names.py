"""No public name goes by accident: those of the last snapshot are all still there.

    python tests/test_repo_public_names.py     takes a new snapshot, and says what is new in it and what is gone

The snapshot is `public_names.json` beside this file: what the root of a package lists, and of its integrations and backends what a document
shows. It is read from the source, so that no extra needs to be installed.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = Path(__file__).with_name("public_names.json")
UPDATE = "python tests/test_repo_public_names.py"
Names = dict[str, list[str]]


def public_names(root: Path = ROOT) -> Names:
    """Names by module that could be public: of every package, and of each module in its integrations and backends."""
    found = {}
    for package in sorted(p.parent for p in root.glob("packages/*/src/*/__init__.py")):
        paths = [package / "__init__.py"]
        for room in ("integrations", "backends"):
            paths += sorted((package / room).rglob("*.py"))
        for path in paths:
            parts = path.relative_to(package.parent).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not any(part.startswith("_") for part in module.split(".")) and (names := names_of(path)):
                found[module] = sorted(names)
    return found


def names_of(path: Path) -> set[str]:
    """What `__all__` says (multicrafter: `_HOMES`); else what the module defines, and an `__init__` also imports from its own package."""
    defined, imported = set(), set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
            if node.level or (node.module or "").split(".")[0] in path.parts:
                imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            if names & {"__all__", "_HOMES"}:
                return set(ast.literal_eval(node.value))
            defined |= names
    return {name for name in defined | imported if not name.startswith("_")}


def kept_names(root: Path = ROOT) -> Names:
    """Those that users rely on: listed by the root, or shown as code in a document."""
    documents = [*root.glob("*.md"), *root.glob("packages/*/README.md"), *root.glob("docs/**/*.md")]
    code = [c for path in documents for c in re.findall(r"^```.*?^```|`[^`\n]+`", path.read_text(), re.M | re.S)]
    shown = set(re.findall(r"\w+", " ".join(code)))
    found = {
        module: [name for name in names if "." not in module or name in shown]
        for module, names in public_names(root).items()
    }
    return {module: names for module, names in found.items() if names}


def difference(before: Names, now: Names) -> tuple[list[str], list[str]]:
    """Full names that are new, and those that are gone."""
    old, new = ({f"{module}.{name}" for module, names in x.items() for name in names} for x in (before, now))
    return sorted(new - old), sorted(old - new)


def test_every_public_name_is_still_there():
    _, gone = difference(json.loads(SNAPSHOT.read_text()), public_names())
    assert not gone, (
        f"public names are gone: {', '.join(gone)}. Users import them: keep each as a deprecated alias for one version. "
        f"If one is to go for good, say so in a fragment changelog.d/<issue>.removal.md and run {UPDATE}"
    )


def test_the_snapshot_has_every_package():
    kept = json.loads(SNAPSHOT.read_text())
    assert {module for module in kept if "." not in module} == {
        p.parent.name for p in ROOT.glob("packages/*/pyproject.toml")
    }
    assert {"gspo.integrations.diffusers", "idar.integrations.diffusers", "moe_lora.integrations.peft"} <= kept.keys()


@pytest.mark.parametrize("name", ["first", "second", "gone", "Class"])
def test_a_name_that_goes_is_noticed(name, tmp_path):
    source = {
        "__init__.py": '"""A."""\nfrom a.b import first\n__all__ = ["first", "second"]\n__all__ += []\n',
        "integrations/__init__.py": "from a.integrations.c import gone\nfrom os import path\n",
        "integrations/c.py": "from x import y\nclass Class: ...\ndef gone(): ...\ndef _private(): ...\nLIMIT: int = 3\n",
    }
    for file, text in source.items():
        path = tmp_path / "packages/a/src/a" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = public_names(tmp_path)
    assert before == {
        "a": ["first", "second"],
        "a.integrations": ["gone"],
        "a.integrations.c": ["Class", "LIMIT", "gone"],
    }
    (tmp_path / "README.md").write_text("`a.integrations.c.Class` does it.")
    assert kept_names(tmp_path) == {"a": ["first", "second"], "a.integrations.c": ["Class"]}
    for file, text in source.items():
        (tmp_path / "packages/a/src/a" / file).write_text(text.replace(name, "other"))
    new, gone = difference(before, public_names(tmp_path))
    assert gone and new and all(g.endswith(f".{name}") for g in gone) and all(n.endswith(".other") for n in new)


def main() -> None:
    """Takes the snapshot."""
    before, now = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.is_file() else {}, kept_names()
    for title, names in zip(("new", "gone"), difference(before, now), strict=True):
        print(f"{title}: {', '.join(names) or 'nothing'}")
    SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
