"""Writes docs/results/index.md: every page there, with one line each.

    python studies/lab/results_index.py

The line of a study is the first sentence of its module in this folder; those of the other pages are in `LINES`.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "results"
LINES = {
    "science": "All studies of the method in the tiny world, and what each found.",
    "ablation": "The paper's ablation, one part at a time, on people nobody has seen.",
    "gspo": "Policy optimization on toy problems: kernels, windows, ratios, clip ranges.",
    "gspo-moe-stability": "Which importance ratio survives that experts are chosen anew in the update, with and without routing replay.",
    "id_reward": "Pictures and matchings a second, against dlib by hand and insightface's own pipeline.",
    "attention_choice": "Which attention loss was chosen and why: the choice on one split, the tests on others, and where it does not help.",
    "idar_losses": "In which direction each form of the attention loss moves attention, in short runs.",
    "idar_cost": "Time and memory of attention supervision beside a training step of full width.",
    "moe_lora": "Mixtures of LoRA experts against one LoRA, a dense mixture and a loop: time and memory.",
    "overhead": "Steps of both stages on full-width slices of FLUX.1-dev: what each part of the method adds.",
    "plan": "Which recipe fits on which graphics card, and how long a step takes there.",
    "data": "Photos into a dataset: seconds a photo, 20,000 for real, a million on paper, a million tiny files; the loader beside a step.",
}
GROUPS = {
    "The method": (
        "bleeding",
        "bleeding_objects",
        "text_only_base",
        "science",
        "ablation",
        "attention_choice",
        "idar_losses",
        "gspo",
        "gspo-moe-stability",
    ),
    "What it costs": ("overhead", "plan", "moe_lora", "idar_cost", "id_reward"),
    "Data": ("data",),
}
HEAD = """# Results

What was measured, with the command that measures it. A page says what was asked, what was found with intervals, and what did not work. If you read only one, read the first.
"""


def sentence(name: str) -> str:
    """What a page is about.

    Raises:
        ValueError: Neither `LINES` nor a study's module says it.
    """
    if name in LINES:
        return LINES[name]
    module = ROOT / "studies" / f"{name}.py"
    text = ast.get_docstring(ast.parse(module.read_text())) if module.is_file() else None
    if not text:
        raise ValueError(f"docs/results/{name}.md must have a line in LINES of {Path(__file__).name}, got none")
    return text.strip().splitlines()[0]


def title(page: Path) -> str:
    """The first heading."""
    return next(line[2:] for line in page.read_text().splitlines() if line.startswith("# "))


def after(line: str, name: str) -> str:
    """The line without the title that it begins with.

    >>> after("Scaling: quality against steps.", "Scaling")
    'Quality against steps.'
    """
    rest = line.removeprefix(name).lstrip(":?! ") if line.startswith(name) else line
    return rest[:1].upper() + rest[1:]


def index(pages: Path = PAGES) -> str:
    """The page."""
    names = sorted(p.stem for p in pages.glob("*.md") if p.stem != "index")
    known = {name for group in GROUPS.values() for name in group}
    text = HEAD
    for heading, group in GROUPS.items():
        listed = [n for n in group if n in names]
        if heading == "The method":
            listed += [n for n in names if n not in known]
        if listed:
            lines = (f"- [{(name := title(pages / f'{n}.md'))}]({n}.md). {after(sentence(n), name)}" for n in listed)
            text += f"\n## {heading}\n\n" + "\n".join(lines) + "\n"
    return text


def write(pages: Path = PAGES) -> None:
    """Writes the list anew where there is one; those who write pages call it."""
    if (pages / "index.md").is_file():
        (pages / "index.md").write_text(index(pages))


if __name__ == "__main__":
    write()
