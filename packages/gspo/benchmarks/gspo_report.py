"""Writes docs/results/gspo.md and docs/results/gspo-moe-stability.md from the recorded JSON files (those that exist).

python packages/gspo/benchmarks/gspo_report.py
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"


def read(name: str) -> dict | None:
    """A recorded file, None where there is none yet."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def origin(data: dict) -> str:
    """The line under every table."""
    c = data["circumstances"]
    versions = ", ".join(f"{k} {v}" for k, v in c["versions"].items())
    changed = " (modified)" if c["modified"] else ""
    return f"`{c['command']}` at {c['commit'][:10]}{changed}, {versions}, {c['device']}, {c['threads']} threads.\n"


def table(header: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


def clip(data: dict) -> str:
    """One setting against one number."""
    text = ["## One setting of the clip range, several kernels\n"]
    text.append(
        '"auto" against a fixed number: the median range that "auto" found for FlowSDE on the same task and seed. Three inner epochs; the clip '
        "fraction is that of the last one. Mean over seeds.\n"
    )
    for task in dict.fromkeys(r["task"] for r in data["rows"]):
        rows = []
        mine = [r for r in data["rows"] if r["task"] == task]
        for kernel in dict.fromkeys(r["kernel"] for r in mine):
            for setting in ("auto", "fixed"):
                found = [r for r in mine if r["kernel"] == kernel and r["setting"] == setting]
                if not found:
                    continue
                mean = {
                    k: statistics.fmean(r[k] for r in found)
                    for k in ("clip_range", "clip_fraction", "reward_first", "reward_last")
                }
                starts = [v for r in found for v in r["clip_range_by_start"].values() if v > 0]
                spread = f"{min(starts):.1e} to {max(starts):.1e}" if setting == "auto" and starts else "-"
                rows.append([
                    kernel, setting, f"{mean['clip_range']:.1e}", spread, f"{mean['clip_fraction']:.2f}",
                    f"{mean['reward_first']:.3f}", f"{mean['reward_last']:.3f}", len(found),
                ])  # fmt: skip
        header = [
            "kernel",
            "setting",
            "range (median)",
            "over window positions",
            "clip fraction",
            "reward, first third",
            "last third",
            "seeds",
        ]
        text += [f"### {task}\n", table(header, rows)]
    return "\n".join([*text, origin(data)])


PAIRS = ("euler_to_exact", "tail_to_exact", "tail_to_euler")


def tail(data: dict) -> str:
    """Error of the second-order tail."""
    rows = [
        [
            r["window_start"], r["euler_steps"], r["tail_steps"],
            *(f"{e['latents']:.3f} / {e['pictures']:.4f} / {e['rank_correlation']:.2f}" for e in (r[k] for k in PAIRS)),
        ]
        for r in data["rows"]
    ]  # fmt: skip
    header = [
        "window starts at",
        "Euler steps after it",
        "second-order steps",
        "Euler to exact",
        "tail to exact",
        "tail to Euler",
    ]
    return "\n".join([
        "## The second-order tail on the tiny FLUX\n",
        "Each cell: RMS error of the final latents (in their standard deviation) / of the pictures (in [0, 1]) / rank correlation of the "
        'JPEG-size reward inside groups of 12. "Exact" is the same solver with 60 steps.\n',
        table(header, rows), origin(data),
    ])  # fmt: skip


def evaluations() -> str:
    """Function evaluations of a sweep, by arithmetic; `test_evaluations_over_a_sweep` counts the calls."""
    steps, size, group = 16, 2, 12
    starts = range(steps - size)
    left = [steps - size - start for start in starts]
    plain = len(starts) * group * steps
    shared = sum(start + group * (steps - start) for start in starts)
    short = sum(s + group * (size + max(1, round(0.4 * n))) for s, n in zip(starts, left, strict=True))
    named = (("plain", plain), ("shared prefix", shared), ("and a tail", short))
    rows = [[name, count, f"{plain / count:.2f}"] for name, count in named]
    return "\n".join([
        "## Function evaluations\n",
        f"A full sweep of the window ({steps} steps, w = {size}, group of {group}, one prompt); the tail takes 40 % of the "
        "steps left, second order.\n",
        table(["rollout", "evaluations", "times fewer"], rows),
    ])  # fmt: skip


def speed(data: dict) -> str:
    """Ratios to the named baselines."""
    groups: dict[str, dict[str, dict]] = {}
    for b in data["benchmarks"]:
        groups.setdefault(b["group"] or b["name"].split("[")[0], {})[b["name"]] = b
    rows = []
    for group, members in groups.items():
        base = next((n for n in members if "bare" in n), None)
        for name, b in members.items():
            s, pair = b["stats"], b["extra_info"]
            if "ratio" in pair:  # both took turns within a round
                low, high = pair["quartiles"]
                rows.append([group, pair["baseline"], f"{pair['baseline_ms']:.0f}", "", s["rounds"], "1.000"])
                ratio = f"{pair['ratio']:.3f} ({low:.3f} to {high:.3f})"
                rows.append([group, "update", f"{pair['update_ms']:.0f}", "", s["rounds"], ratio])
                continue
            ratio = f"{s['median'] / members[base]['stats']['median']:.3f}" if base else "-"
            what = name.split("[")[1].rstrip("]")
            rows.append([group, what, f"{s['median'] * 1e3:.2f}", f"{s['iqr'] * 1e3:.2f}", s["rounds"], ratio])
    header = ["group", "what", "median, ms", "inter-quartile range", "rounds", "ratio to the baseline"]
    return "\n".join(["## Speed\n", table(header, rows), origin(data)])


def moe(data: dict) -> str:
    """The stability study's page."""
    rows = [
        [
            f"{r['lr']:g}", r["variant"], f"{r['final']:.3f} +- {r['spread']:.3f}", f"{r['collapsed']} of {r['seeds']}",
            f"{r['ratio_std']:.1e}", f"{r['clip_fraction']:.2f}", f"{100 * r['rerouted']:.1f} %",
        ]
        for r in data["summary"]
    ]  # fmt: skip
    header = [
        "lr",
        "ratio",
        "final reward +- spread over seeds",
        "collapsed",
        "ratio's spread",
        "clip fraction",
        "re-routed latents",
    ]
    return "\n".join([
        "# Ratios under expert routing\n",
        "A policy of four experts, one per latent (top-1, weighted by its probability), router trained along, 16 dimensions, "
        "6 prompts in groups of 8, windows of 2 of 8 steps, 4 inner epochs, `clip_range=\"auto\"`, five seeds. The reward is minus "
        "the mean squared distance to a target per prompt. A run collapses if its last ten iterations are, on average, no better than "
        "its first. Re-routed latents are stored ones that another expert gets in the update (replay forbids it).\n",
        table(header, rows), "![reward curves](gspo-moe-stability.png)\n", *FINDINGS.get("moe", []), origin(data),
    ])  # fmt: skip


# what people concluded from the recorded figures; revise it with them
FINDINGS: dict[str, list[str]] = {}


def main() -> None:
    """Writes the pages."""
    parts = [
        make(data)
        for name, make in (("gspo_clip.json", clip), ("gspo_tail.json", tail), ("gspo_speed.json", speed))
        if (data := read(name))
    ]
    parts.insert(0, evaluations())
    intro = "# gspo\n\nGenerated by `packages/gspo/benchmarks/gspo_report.py` from `benchmarks/results/gspo_*.json`."
    if read("gspo_moe_stability.json"):
        intro += " See also [ratios under expert routing](gspo-moe-stability.md)."
    (DOCS / "gspo.md").write_text(intro + "\n\n" + "\n".join(parts))
    if data := read("gspo_moe_stability.json"):
        (DOCS / "gspo-moe-stability.md").write_text(moe(data))
        shutil.copy(RESULTS / "gspo_moe_stability.png", DOCS / "gspo-moe-stability.png")


if __name__ == "__main__":
    main()
