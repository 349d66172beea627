"""Puts a hosted Space together: ``python spaces/build.py OUT`` makes a folder that can be pushed as it is.

A Space installs ``requirements.txt`` before it sees the other files, so the five packages travel as source, and what they need is listed.
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gspo", "idar", "moe_lora", "id_reward", "multicrafter")
TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"


def requirements(root: Path = ROOT) -> list[str]:
    """What the packages need from an index, each once; gradio is the Space's own."""
    found: dict[str, str] = {}
    siblings = {name.replace("_", "-") for name in PACKAGES}
    for package in PACKAGES:
        project = tomllib.loads((root / "packages" / package / "pyproject.toml").read_text())["project"]
        for line in project["dependencies"]:  # multicrafter comes last, and its bounds are the ones that count
            name = re.match(r"[\w-]+", line)
            assert name is not None
            if name.group() not in siblings:
                found[name.group()] = line
    return sorted(found.values())


def build(out: Path, root: Path = ROOT) -> Path:
    """Writes the folder; it must not be there yet.

    Raises:
        FileExistsError: It is.
    """
    out.mkdir(parents=True)
    for name in ("app.py", "README.md"):
        shutil.copy(root / "spaces" / "tiny" / name, out / name)
    for package in PACKAGES:
        shutil.copytree(
            root / "packages" / package / "src" / package,
            out / "src" / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(root / "LICENSE", out / "LICENSE")
    (out / "requirements.txt").write_text("\n".join([TORCH, *requirements(root)]) + "\n")
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("error: name one folder that is not there yet")
    print(build(Path(sys.argv[1])))
