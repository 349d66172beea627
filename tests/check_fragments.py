"""Every package has a changelog fragment for unreleased work, and every fragment is named as towncrier wants it.

A package needs one while commits since its last tag `<package>-v*` (or since the beginning) touch its `src`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"^(\d+|\+\w+)(\.[\w-]+)?\.(feature|bugfix|doc|removal|misc)\.md$")


def git(*arguments: str) -> str:
    """Output of a git command in the repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def problems(root: Path = ROOT) -> list[str]:
    """One sentence for each missing or misnamed fragment."""
    found = []
    for package in sorted(p for p in (root / "packages").iterdir() if (p / "pyproject.toml").exists()):
        fragments = [f for f in (package / "changelog.d").glob("*") if f.name != ".gitkeep"]
        found += [f"{f} is not named <issue>[.<word>].<feature|bugfix|doc|removal|misc>.md" for f in fragments if not NAME.match(f.name)]
        tags = git("tag", "--list", f"{package.name}-v*", "--sort=-creatordate").splitlines()
        since = [f"{tags[0]}..HEAD"] if tags else ["HEAD"]
        if not fragments and git("log", "--oneline", *since, "--", f"packages/{package.name}/src"):
            found.append(f"packages/{package.name}/src changed but packages/{package.name}/changelog.d has no fragment")
    return found


if __name__ == "__main__":
    for line in problems():
        print(line, file=sys.stderr)
    sys.exit(bool(problems()))
