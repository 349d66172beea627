"""Writes docs/results/moe_lora.md and its picture from benchmarks/results/moe_lora_speed.json.

python packages/moe_lora/benchmarks/results_moe_lora.py
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "benchmarks" / "results" / "moe_lora_speed.json"
# figure, ratio, wanted, whether more is better
ROWS = [
    ("float32, keep", "grouped, 4 experts / lora", 1.15, False),
    ("float32, keep", "grouped, 4 experts / lora scaled as in peft", 1.15, False),
    ("float32, keep", "grouped, 32 experts / 4 experts", 1.35, False),
    ("float32, keep, processor time, 1 thread", "grouped, 4 experts / lora", 1.15, False),
    ("float32, keep, processor time, 1 thread", "grouped, 4 experts / lora scaled as in peft", 1.15, False),
    ("float32, keep, processor time, 1 thread", "grouped, 32 experts / 4 experts", 1.35, False),
    ("float32, default", "grouped, 4 experts / lora", 1.15, False),
    ("float32, default", "grouped, 32 experts / 4 experts", 1.35, False),
    ("float32, keep, twins", "dense / grouped, 4 experts", 3.0, True),
    ("float32, keep, twins", "loop / grouped, 4 experts", 1.0, True),
    ("float32, keep, twins", "loop / grouped, 32 experts", 1.0, True),
    ("ffn, float32, keep", "mixture / plain LoRA, forward and backward", 1.02, False),
    ("ffn, float32, keep, forward", "mixture / plain LoRA, forward", 1.02, False),
    ("bfloat16, keep", "grouped, 4 experts / lora", None, False),
    ("bfloat16, keep", "grouped, 32 experts / 4 experts", None, False),
]


def verdict(value: float, wanted: float | None, more: bool) -> str:
    if wanted is None:
        return "not asked for"
    met = value >= wanted if more else value <= wanted
    return f"{'at least' if more else 'at most'} {wanted:g}: {'met' if met else 'missed'}"


def picture(figures: dict, path: Path) -> None:
    """Medians with quartiles, the wanted value as a line."""
    rows = [row for row in ROWS if row[0] in figures]
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    for y, (key, title, wanted, more) in enumerate(reversed(rows)):
        found = figures[key]["ratios"][title]
        met = wanted is None or (found["median"] >= wanted if more else found["median"] <= wanted)
        axis.barh(y, found["median"], color="#7aa6c2" if met else "#d9793a", height=0.6)
        axis.plot([found["q1"], found["q3"]], [y, y], color="0.15", linewidth=1.6)
        if wanted is not None:
            axis.plot([wanted, wanted], [y - 0.4, y + 0.4], color="0.15", linestyle=":", linewidth=1.4)
    axis.set_yticks(
        range(len(rows)), [f"{title}  ({key.removeprefix('ffn, ')})" for key, title, *_ in reversed(rows)], fontsize=8
    )
    axis.axvline(1, color="0.6", linewidth=0.8)
    axis.set_xlabel("ratio within a round: median, quartiles (line), wanted (dotted); orange misses it", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    figures = json.loads(SOURCE.read_text())
    picture(figures, ROOT / "docs" / "results" / "moe_lora_speed.png")
    timed = [v["circumstances"] for k, v in figures.items() if k != "memory"]
    first, shared = timed[0], figures["float32, keep, processor time, 1 thread"]["circumstances"]
    sizes = first["sizes"]
    machine = f"{first['threads']} threads on {first['device']}, torch {first['torch']}"
    text = (Path(__file__).with_name("moe_lora_results.md")).read_text()
    shape = f"{sizes['tokens']} tokens, width {sizes['width']}, rank {sizes['rank']}"
    text = text.replace("SIZES", shape).replace("MACHINE", machine)
    text = text.replace("SHARED", f"{shared['device']}, load {shared['load'][0]:.0f}")
    head, limits = text.split("TABLES")
    lines = [
        head.strip(),
        "",
        "| figure | ratio | median | quartiles | of the fastest | rounds | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, title, wanted, more in ROWS:
        if key in figures:
            found = figures[key]["ratios"][title]
            rounds = len(next(iter(figures[key]["seconds"].values())))
            spread = f"{found['q1']:.2f} to {found['q3']:.2f}"
            numbers = f"{found['median']:.3f} | {spread} | {found['of_fastest']:.3f} | {rounds}"
            lines.append(f"| {key} | {title} | {numbers} | {verdict(found['median'], wanted, more)} |")
    lines += [
        "",
        "## Memory",
        "",
        "Bytes of distinct storages that the graph keeps for backward, parameters left out, against `lora`; wanted: at most 1.25.",
        "",
        "| | ratio | MB |",
        "|---|---|---|",
        *(f"| {k} | {v['ratio']:.3f} | {v['bytes'] / 1e6:.1f} |" for k, v in figures["memory"]["ratios"].items()),
        "",
        limits.strip(),
        "",
    ]
    (ROOT / "docs" / "results" / "moe_lora.md").write_text("\n".join(lines))
    print(f"docs/results/moe_lora.md: {len(figures)} figures")


if __name__ == "__main__":
    main()
