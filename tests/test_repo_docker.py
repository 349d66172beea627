"""The container's file names what is there, and keeps to what linters of such files ask for. Nothing is built: no Docker is needed here."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker" / "Dockerfile"
Step = tuple[str, str]


def stages(text: str) -> dict[str, tuple[str, list[Step]]]:
    """Stage -> what it starts from, and its instructions; comments gone, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found: dict[str, tuple[str, list[Step]]] = {}
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(None, 1)
        if word == "FROM":
            source, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            found[name] = (source, [])
        else:
            assert word in {"COPY", "RUN", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}, f"{word} is not used here"
            list(found.values())[-1][1].append((word, rest))
    return found


@pytest.fixture(scope="module")
def parsed() -> dict[str, tuple[str, list[Step]]]:
    return stages(FILE.read_text())


def chain(parsed: dict[str, tuple[str, list[Step]]], name: str) -> list[Step]:
    """The instructions of a stage and of all that it starts from, in order."""
    source, steps = parsed[name]
    return (chain(parsed, source) if source in parsed else []) + steps


def test_every_stage_starts_from_a_pinned_image_or_an_earlier_stage(parsed):
    assert {"cpu", "cuda"} <= parsed.keys()
    for at, (source, _) in enumerate(parsed.values()):
        assert source in list(parsed)[:at] or re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]*\d[\w.-]*", source), source


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out; the last line that matches decides, as Docker has it."""
    out = False
    for line in (FILE.parent / "Dockerfile.dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        parts = [path, *(str(p) for p in Path(path).parents if str(p) != ".")]
        if any(fnmatch.fnmatch(p, pattern.removeprefix("**/")) or fnmatch.fnmatch(Path(p).name, pattern.removeprefix("**/"))
               if pattern.startswith("**/") else fnmatch.fnmatch(p, pattern) for p in parts):  # fmt: skip
            out = not line.startswith("!")
    return out


def test_what_is_copied_or_mounted_is_there_and_not_ignored(parsed):
    for _, steps in parsed.values():
        for word, rest in steps:
            if word == "COPY":
                source = rest.split()[0]
                assert (ROOT / source).exists() and not ignored(source), source
            for mount in re.findall(r"--mount=(\S+)", rest):
                options = dict(o.split("=") for o in mount.split(","))
                if "from" in options:
                    assert options["from"] in parsed
                else:
                    assert (ROOT / options["source"]).exists() and not ignored(options["source"]), options
    assert ignored("packages/gspo/tests/test_x.py") and ignored(".git/config") and ignored("studies/all.py")
    assert not ignored("packages/gspo/src/gspo/step.py")
    assert not ignored("packages/multicrafter/src/multicrafter/world/weights/tiny_flux/model_index.json")


def test_all_packages_of_this_repository_are_built(parsed):
    (build,) = [rest for word, rest in parsed["wheels"][1] if word == "RUN"]
    assert set(re.findall(r"\./packages/(\w+)", build)) == {
        p.parent.name for p in ROOT.glob("packages/*/pyproject.toml")
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_nobody_special_and_keeps_no_caches(parsed, target):
    steps = chain(parsed, target)
    assert [rest for word, rest in steps if word == "USER"][-1] not in ("root", "0")
    for word, rest in steps:
        if word == "RUN" and "pip " in rest:
            assert "--no-cache-dir" in rest and "--constraint /constraints.txt" in rest
        assert "apt-get" not in rest or ("--no-install-recommends" in rest and "/var/lib/apt/lists" in rest)
        assert not (word == "RUN" and re.search(r"\bsudo\b|curl[^|]*\|", rest))
    (script,) = re.findall(r"\w+", [rest for word, rest in steps if word == "ENTRYPOINT"][-1])
    scripts = tomllib.loads((ROOT / "packages/multicrafter/pyproject.toml").read_text())["project"]["scripts"]
    assert script in scripts
    assert ("download.pytorch.org/whl/cpu" in str(steps)) == (target == "cpu")


def test_the_image_is_of_a_python_that_every_package_takes(parsed):
    minor = int(re.search(r"python:3\.(\d+)", parsed["base"][0]).group(1))
    for path in ROOT.glob("packages/*/pyproject.toml"):
        least = tomllib.loads(path.read_text())["project"]["requires-python"]
        assert minor >= int(re.search(r">=3\.(\d+)", least).group(1)), path


def test_the_commands_in_its_comment_are_commands():
    used = re.findall(r"multicrafter:\w+ ([\w-]+)", FILE.read_text())
    done = subprocess.run([sys.executable, "-m", "multicrafter", "--help"], capture_output=True, text=True, check=True)
    assert used and all(re.search(rf"^    {name}( |$)", done.stdout, re.M) for name in used if name != ".")
