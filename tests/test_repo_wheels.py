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
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from strangers import PROGRAMS
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
        if re.search(
            r"(^|/)(tests?|benchmarks|studies|changelog\.d)/|(^|/)(test|bench)_\w*\.py$|\.pyc$|\.pkl$|\.pt$", f
        )
    ]
    limit = 15e6 if name == "multicrafter" else 0.3e6  # multicrafter ships the tiny model
    assert wheels[name].stat().st_size < limit


@pytest.mark.parametrize("name", PACKAGES)
def test_a_source_archive_has_what_its_tests_need(sdists, name):
    """Its own tests and their settings, README, licence and changelog; nothing of another package, and no results or caches."""
    with tarfile.open(sdists[name]) as archive:
        files = {f.name.partition("/")[2] for f in archive.getmembers() if f.isfile()}
    folder = ROOT / "packages" / name
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", f"src/{name}/py.typed"} <= files
    tracked = subprocess.run(
        ["git", "ls-files", "tests", "src"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert set(tracked.stdout.split()) <= files
    rooms = {"src", "tests", "benchmarks", "changelog.d", "scripts"}
    assert {f.split("/")[0] for f in files if "/" in f} <= rooms
    assert not [f for f in files if re.search(r"\.pyc$|\.pkl$|__pycache__|(^|/)runs/", f)]
    assert sdists[name].stat().st_size < (15e6 if name == "multicrafter" else 0.5e6)


def test_archives_pass_the_index_s_check(wheels, sdists):
    """What PyPI would refuse or render badly."""
    archives = [str(path) for path in (*wheels.values(), *sdists.values())]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *archives], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == len(archives)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_readme_is_whole_on_an_index(name):
    """A relative link leads nowhere there, and a picture of the repository is not shown."""
    text = re.sub(r"^```.*?^```", "", (ROOT / "packages" / name / "README.md").read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", text)
    assert [link for pair in links for link in pair if link and not re.match(r"https?://|#", link)] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_metadata(wheels, name):
    data = metadata(wheels[name])
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Requires-Python"] in (">=3.10", ">=3.11")
    assert data["Version"] == importlib.import_module(name).__version__
    assert data["Keywords"] and data["Summary"] and data["Author"]
    assert any(url.startswith("Paper, https://") for url in data.get_all("Project-URL"))
    classifiers = data.get_all("Classifier")
    assert {"Typing :: Typed", "Intended Audience :: Science/Research"} <= set(classifiers)
    lowest = data["Requires-Python"].removeprefix(">=")
    assert next(c for c in classifiers if c.startswith("Programming Language :: Python :: 3.")).endswith(lowest)
    assert " @ " not in "".join(data.get_all("Requires-Dist")), "an index refuses direct references"
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
    """The wheel and its dependencies from the index, nothing else, outside the repository: the README's blocks for the core run, and so does
    what a stranger writes, which strict mypy accepts and a fresh process goes on from."""
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
    said = []
    for file, program in zip(("first.py", "second.py"), PROGRAMS[name]):
        (tmp_path / file).write_text(program)
        done = subprocess.run([python, file], cwd=tmp_path, capture_output=True, text=True, check=True)
        said.append(done.stdout.split()[-1])
    assert said[0] == said[1]
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), "mypy"], check=True)
    mypy = [
        python,
        "-m",
        "mypy",
        "--strict",
        "--untyped-calls-exclude",
        "torch",
        "--no-pretty",
        "first.py",
        "second.py",
    ]
    checked = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAVES)
def test_a_source_archive_is_tested_alone(sdists, name, tmp_path):
    """Unpacked, in an environment with what `[test]` brings and nothing else: its tests pass, and those left out say what they need."""
    with tarfile.open(sdists[name]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), ".[test]"], cwd=folder, check=True
    )
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-rs", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.M)
    assert skipped and [line for line in skipped if "needs" not in line] == []


def everything_but_ours(folder: Path) -> Path:
    """A folder with what is installed here except our five packages, for an environment that must not find them."""
    folder.mkdir()
    ours = re.compile(rf"^_?(?:{'|'.join(PACKAGES)})\b.*", re.I)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not ours.match(path.name) and path.suffix != ".pth" and not path.name.startswith("__editable__"):
            (folder / path.name).symlink_to(path)
    return folder


def folders_to_install() -> list[str]:
    """The folders that the README's first command names."""
    line = re.search(r"^    pip install (\./packages.*)$", (ROOT / "README.md").read_text(), re.M).group(1)
    return line.split()


@pytest.mark.slow
def test_one_command_installs_a_checkout(tmp_path):
    """The README's, without an index and without any of ours installed. One folder alone fails, as docs/adr/0005 says."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True
    )  # the old one that venv brings
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text(str(everything_but_ours(tmp_path / "others")))
    pip = [str(python), "-m", "pip", "install", "--no-index", "--no-build-isolation", "-q"]

    def install(*folders: str) -> subprocess.CompletedProcess:
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}
        return subprocess.run([*pip, *folders], cwd=ROOT, env=clean, capture_output=True, text=True)

    alone = install("./packages/multicrafter")
    assert alone.returncode != 0 and "No matching distribution found for gspo" in alone.stderr
    together = install(*folders_to_install())
    assert together.returncode == 0, together.stderr
    command = [str(tmp_path / "env" / "bin" / "multicrafter"), "draw-references", "--out", "people"]
    subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, check=True)
    assert (tmp_path / "people" / "a.png").is_file()


def test_everybody_is_named_where_a_checkout_is_installed():
    assert {Path(folder).name for folder in folders_to_install()} == set(PACKAGES)
    settings = tomllib.loads((ROOT / "packages" / "multicrafter" / "pyproject.toml").read_text())
    sources = {name.replace("-", "_"): source for name, source in settings["tool"]["uv"]["sources"].items()}
    assert sources == {name: {"path": f"../{name}"} for name in LEAVES}
