"""Every package has a changelog fragment for unreleased work, and every fragment is named as towncrier wants it.

A package needs one while commits since its last release touch its ``src``. A release is the last tag ``<package>-v*``,
and where there is none yet the last commit that wrote its ``CHANGELOG.md``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"^(\d+|\+\w+)(\.[\w-]+)?\.(feature|bugfix|doc|removal|misc)\.md$")


def problems(root: Path = ROOT) -> list[str]:
    """One sentence for each missing, empty or misnamed fragment of the checkout `root`."""

    def git(*arguments: str) -> list[str]:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    found = []
    for package in sorted(path.parent for path in root.glob("packages/*/pyproject.toml")):
        name = package.name
        fragments = [path for path in (package / "changelog.d").glob("*") if not path.name.startswith(".")]
        for path in fragments:
            where = path.relative_to(root)
            if not NAME.match(path.name):
                found.append(f"{where}: the name should be <issue>[.<word>].<feature|bugfix|doc|removal|misc>.md")
            if not path.read_text().strip():
                found.append(f"{where}: the fragment is empty")
        tags = git("tag", "--list", f"{name}-v*", "--sort=-version:refname")
        written = git("log", "-1", "--format=%h", "--", f"packages/{name}/CHANGELOG.md")
        release = (tags or written or [None])[0]
        since = f"{release}..HEAD" if release else "HEAD"
        if not fragments and git("log", "--oneline", since, "--", f"packages/{name}/src"):
            found.append(
                f"packages/{name}/src changed since {release or 'the beginning'}, but changelog.d has no fragment"
            )
    return found


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or "changelog fragments: fine", file=sys.stderr if found else sys.stdout)
    sys.exit(bool(found))
