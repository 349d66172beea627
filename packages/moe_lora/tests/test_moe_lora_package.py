"""What a stranger sees of the package: its README and what it says of itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import moe_lora
import pytest

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(
    not README.exists(), reason="needs the README, which is in the repository and in the sdist"
)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S) if README.exists() else []


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_code_of_the_readme_runs(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("peft", "transformers"):
        if f"integrations.{extra}" in BLOCKS[block]:
            pytest.importorskip(extra, "0.21" if extra == "peft" else "4.57", reason=f"needs the extra {extra}")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[block], str(README), "exec"), {"__name__": "readme"})


def test_links_of_the_readme_work_outside_of_the_repository() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|<((?:https?|\.)[^>]*)>", README.read_text())
    assert [a or b for a, b in links if not (a or b).startswith("https://")] == []


def test_every_public_name_exists_and_has_a_docstring() -> None:
    named = {name: getattr(moe_lora, name) for name in moe_lora.__all__}
    written = {name: found for name, found in named.items() if inspect.isclass(found) or inspect.isroutine(found)}
    assert len(written) > 20 and [name for name, found in written.items() if not found.__doc__] == []
