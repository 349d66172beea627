"""Every wheel holds what it should, and a leaf's wheel works where nothing but its stated dependencies can be imported."""

from __future__ import annotations

import ast
import email
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from test_repo_readme import blocks

ROOT = Path(__file__).resolve().parent.parent

# architecture.md: what the core of each leaf may need
LEAVES = {
    "gspo": {"torch", "jaxtyping"},
    "idar": {"torch", "jaxtyping"},
    "moe_lora": {"torch", "jaxtyping", "safetensors"},
    "id_reward": {"numpy", "scipy", "jaxtyping"},
}
PACKAGES = [*LEAVES, "multicrafter"]

# Runs in a fresh interpreter, in which a module that is neither the standard library's nor in `allowed` is as good as not installed.
IMPORT_ALONE = """
import importlib, json, pkgutil, sys
target, name, allowed = sys.argv[1], sys.argv[2], set(json.loads(sys.argv[3]))

class Closed:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, item):
        return getattr(self.finder, item)

    def find_spec(self, fullname, path=None, target=None):
        top = fullname.split(".")[0]
        known = top == name or top in allowed or top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        return self.finder.find_spec(fullname, path, target) if known else None

sys.meta_path[:] = [Closed(finder) for finder in sys.meta_path]
sys.path.insert(0, target)
package = importlib.import_module(name)
assert package.__file__.startswith(target), package.__file__
seen, lacking = [name], {}
for module in pkgutil.walk_packages(package.__path__, name + "."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
        seen.append(module.name)
    except ImportError as error:
        lacking[module.name] = str(error)
print(json.dumps([seen, lacking]))
"""


def closure(requirements: set[str]) -> set[str]:
    """Import names of these distributions and of everything they need."""
    names: set[str] = set()
    waiting = set(requirements)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in names:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names.add(name)
        waiting |= {re.match(r"[\w.-]+", need).group() for need in needs if "extra ==" not in need}
    modules = importlib.metadata.packages_distributions()
    return {top for top, dists in modules.items() if any(re.sub(r"[-_.]+", "-", d).lower() in names for d in dists)}


def metadata(wheel: Path) -> email.message.Message:
    """The wheel's METADATA file."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def core_requirements(wheel: Path) -> set[str]:
    """Names of the requirements without extras."""
    stated = metadata(wheel).get_all("Requires-Dist") or []
    return {re.match(r"[\w.-]+", line).group() for line in stated if "extra ==" not in line}


def needs_an_extra(block: str, name: str) -> bool:
    """Whether a block imports what the leaf's core does not bring: another library, or the leaf's side of one."""
    allowed = {name, *closure(LEAVES[name]), *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            if module.split(".")[0] not in allowed or re.match(rf"{name}\.(integrations|backends|plot)\b", module):
                return True
    return False


@pytest.mark.parametrize("name", LEAVES)
def test_a_readme_shows_the_core_alone(name):
    """So the clean environment below has something to run; what needs an extra is told apart."""
    shown = blocks(ROOT / "packages" / name / "README.md")
    assert [b for b in shown if not needs_an_extra(b, name)]
    assert needs_an_extra("import diffusers", name)
    assert needs_an_extra(f"from {name}.integrations.some import thing", name)
    assert not needs_an_extra(f"import os.path\nimport jaxtyping\nfrom {name} import thing", name)


def test_every_package_is_known_here(wheels):
    assert set(wheels) == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_contents(wheels, name):
    with zipfile.ZipFile(wheels[name]) as archive:
        files = archive.namelist()
        (record,) = [f for f in files if f.endswith(".dist-info/METADATA")]
    assert f"{name}/py.typed" in files
    info = record.removesuffix("METADATA")
    assert f"{info}licenses/LICENSE" in files
    strangers = [f for f in files if not f.startswith((f"{name}/", info))]
    assert strangers == []
    assert not [
        f
        for f in files
        if re.search(r"(^|/)(tests?|benchmarks|changelog\.d)/|(^|/)(test|bench)_\w*\.py$|\.pyc$|\.pkl$|\.pt$", f)
    ]
    assert sum(f.file_size for f in zipfile.ZipFile(wheels[name]).infolist()) < 30e6


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_metadata(wheels, name):
    data = metadata(wheels[name])
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Requires-Python"] in (">=3.10", ">=3.11")
    assert data["Version"] == importlib.import_module(name).__version__
    assert "==" not in "".join(r.split(";")[0] for r in data.get_all("Requires-Dist") or []), "ranges, not pins"
    assert data.get_payload().strip(), "the README is the long description"


def test_sibling_versions_fit(wheels):
    """multicrafter's ranges for its siblings contain their present versions."""
    from packaging.requirements import Requirement

    stated = {
        r.name.replace("-", "_"): r.specifier
        for r in map(Requirement, metadata(wheels["multicrafter"]).get_all("Requires-Dist"))
    }
    for leaf in LEAVES:
        version = metadata(wheels[leaf])["Version"]
        assert version in stated[leaf], f"{leaf} {version} is outside {stated[leaf]}"
        assert "<" in str(stated[leaf]), "sibling versions are bounded"


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_needs_only_what_it_may(wheels, name, tmp_path):
    assert core_requirements(wheels[name]) == LEAVES[name]
    with zipfile.ZipFile(wheels[name]) as archive:
        archive.extractall(tmp_path)  # what pip install --no-deps --target does for a pure wheel
    command = [sys.executable, "-c", IMPORT_ALONE, str(tmp_path), name, json.dumps(sorted(closure(LEAVES[name])))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen, lacking = json.loads(done.stdout.splitlines()[-1])
    assert len(seen) > 3
    for module, message in lacking.items():
        assert re.search(r"\.(integrations|backends|examples|plot)\b", module), f"{module}: {message}"
        assert "pip install" in message, f"{module} does not name the pip line: {message}"


def test_blocking_works(tmp_path):
    """The test above would notice a forbidden import."""
    (tmp_path / "gspo").mkdir()
    (tmp_path / "gspo" / "__init__.py").write_text("import scipy")
    command = [sys.executable, "-c", IMPORT_ALONE, str(tmp_path), "gspo", json.dumps(["torch", "numpy"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "scipy" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAVES)
def test_leaf_in_a_clean_environment(wheels, name, tmp_path):
    """The wheel, its dependencies from the index and pytest, nothing else, outside the repository: the README's blocks for the core run."""
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheels[name])]
    subprocess.run(install, cwd=tmp_path, check=True)
    found = subprocess.run(
        [python, "-c", f"import {name}; print({name}.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == metadata(wheels[name])["Version"]
    snippets = [b for b in blocks(ROOT / "packages" / name / "README.md") if not needs_an_extra(b, name)]
    assert snippets
    subprocess.run([python, "-c", "\n".join(snippets)], cwd=tmp_path, check=True)
