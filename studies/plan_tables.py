"""Plans every recipe of a full-size base on cards of 24, 40, 80 and 141 GB, and writes the results page.

python -m studies.plan_tables           # plans (a few minutes), then the page
python -m studies.plan_tables --recipes flux2_dev_stage1 flux2_dev_stage2   # plans these anew, and keeps the others
python -m studies.plan_tables --page    # the page alone, from the JSON files
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
SMALL = "execution.quantization=nf4", "execution.optimizer=adamw8bit"
ALONE = "execution.parallel=ddp"


def variants(recipe: str) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Number of cards and changes, by name."""
    prefix = "align" if recipe.endswith("2") else "pretrain"
    rank = "adapters." if prefix == "align" else "pretrain.adapters."
    low = (f"{rank}rank=64", f"{rank}alpha=64")
    small = tuple(f"{prefix}.{c}" for c in SMALL)
    ddp = f"{prefix}.{ALONE}"
    made = {"as it is": (1, ()), "NF4 base, 8-bit AdamW": (1, (ddp, *small))}
    if "flux2_dev" in recipe:  # which is so already
        del made["NF4 base, 8-bit AdamW"]
    if "flux1" in recipe:
        made["rank 64"] = (1, low)
        made["rank 64, NF4 base, 8-bit AdamW"] = (1, (ddp, *small, *low))
        made["8 cards, sharded"] = (8, ())
    else:
        made["8 cards, DDP"] = (8, ())
    return made


RECIPES = tuple(
    f"{base}_stage{stage}"
    for base in ("flux1_dev", "flux2_klein", "flux2_dev", "qwen_image_edit", "qwen_image_21")
    for stage in (1, 2)
)


def one_pass(recipe: str, changes: tuple[str, ...], rows: int):
    """In a process of its own."""
    from multicrafter.config.recipes import resolve
    from multicrafter.plan import measure

    start = time.monotonic()
    found = measure(resolve(recipe=recipe, changes=changes), rows=rows)
    print(recipe, changes, f"{time.monotonic() - start:.0f} s", flush=True)
    return found


def plans(recipes: Sequence[str] = RECIPES, *, processes: int = 6) -> list[dict]:
    """Every variant of some recipes on every card."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from dataclasses import asdict

    from multicrafter.config.recipes import resolve
    from multicrafter.plan import CARDS, predict
    from multicrafter.plan.estimate import rows_of, with_cache

    cases, passes = [], {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for recipe in recipes:
            for name, (gpus, changes) in variants(recipe).items():
                run = with_cache(resolve(recipe=recipe, changes=changes))
                rows, _ = rows_of(run, gpus)
                rank = run.pretrain.adapters.rank if recipe.endswith("1") else run.adapters.rank
                key = (recipe, rank, rows)
                if key not in passes:
                    passes[key] = pool.submit(
                        one_pass, recipe, tuple(c for c in changes if ".adapters." in f".{c}"), rows
                    )
                cases.append((recipe, name, changes, gpus, run, key))
        measured = {key: future.result() for key, future in passes.items()}
    made = []
    for recipe, name, changes, gpus, run, key in cases:
        for card in CARDS.values():
            plan = predict(run, card, gpus=gpus, measured=measured[key])
            own = {"recipe": recipe, "variant": name, "changes": changes}
            made.append({**own, **asdict(plan), "peak": plan.peak, "needed": plan.needed, "fits": plan.fits})
    return made


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def table(rows: list[dict]) -> str:
    """One recipe: variants down, cards across."""
    cards = sorted({r["card"]["memory"] for r in rows})
    lines = [
        "| variant | trained | needed a card | of it | " + " | ".join(f"{c / 1e9:g} GB" for c in cards) + " |",
        "|---|---|---|---|" + "---|" * len(cards),
    ]
    for variant in dict.fromkeys(r["variant"] for r in rows):
        own = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["card"]["memory"])
        parts = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in own[0]["parts"].items() if v >= 5e7)
        cells = " | ".join(f"{r['seconds']:.1f} s" if r["fits"] else "no" for r in own)
        lines.append(
            f"| {variant} | {own[0]['trained_parameters'] / 1e6:,.0f} M | {own[0]['needed'] / 1e9:.1f} GB | {parts} | {cells} |"
        )
    return "\n".join(lines)


def page() -> str:
    """Markdown of docs/results/plan.md."""
    from multicrafter.plan.hardware import CARDS, EFFICIENCY, FRAGMENTATION, FUSION, RESERVED

    path = RESULTS / "plan.json"
    content = json.loads(path.read_text()) if path.exists() else {"plans": []}
    text = (
        "# What fits where\n\n`multicrafter plan` on the full-size networks, 512-pixel pictures and two references of 320 pixels; texts and "
        "pictures encoded beforehand. A cell has the estimated seconds of one optimizer step (stage 1: 8 samples; stage 2: 96 rollouts of 16 "
        "steps and two passes over a window of 2), or *no*. GB are 10^9 bytes.\n\n"
        "    python -m studies.plan_tables\n"
    )
    for recipe in dict.fromkeys(r["recipe"] for r in content["plans"]):
        rows = [r for r in content["plans"] if r["recipe"] == recipe]
        first = rows[0]
        text += (
            f"\n## {recipe}\n\n{first['tokens']:,} tokens a sample, {first['flops'] / 1e12:,.0f} TFLOP and {first['moved'] / 1e12:,.1f} TB of "
            f"unfused traffic a step, {first['cached'] / 1e9:,.0f} GB of encoded data on the host.\n\n{table(rows)}\n"
        )
    cards = ", ".join(f"{m} GB: {c.name} ({c.tflops:g} TFLOP/s, {c.bandwidth:g} GB/s)" for m, c in CARDS.items())
    text += (
        f"\n*Needed* is the peak plus {FRAGMENTATION:.0%} for the allocator and {RESERVED / 1e9:.1f} GB for the device. Seconds are the larger of "
        f"arithmetic at {EFFICIENCY:.0%} of the card's peak and {FUSION:.0%} of the unfused traffic at its bandwidth, plus the exchange between "
        f"cards ({cards}). These shares are assumptions: no GPU was at hand. Memory was checked:\n"
    )
    text += validation()
    if not content["plans"]:
        return text
    where = content["circumstances"]
    return text + (
        f"\nPlans: commit `{where['commit'][:12]}`, torch {where['versions']['torch']}, diffusers {where['versions']['diffusers']}.\n"
    )


def validation() -> str:
    """The check against measured peaks, if it has been run."""
    path = RESULTS / "plan_validation.json"
    if not path.exists():
        return ""
    content = json.loads(path.read_text())
    rows = content["results"]
    errors = [abs(r["ratio"] - 1) for r in rows]
    text = (
        "\n## Checked against measured peaks\n\nFull-width slices (1 double and 1 single block, rank and experts of the recipes, 512 text tokens) "
        "on the CPU: one step of stage 1, forward to AdamW. Predicted from fake tensors; measured as the kernel's peak of the process's resident "
        f"memory. {len(rows)} cases, error {max(errors):.1%} at most, {statistics.median(errors):.1%} at the median (allowed: 10 %).\n\n"
        "    python -m studies.plan_check\n\n"
        "| slice of | pixels | references | computed in | predicted | measured | ratio |\n|---|---|---|---|---|---|---|\n"
    )
    for r in rows:
        case = r["case"]
        how = case["dtype"] + (", recomputed" if case["checkpointing"] else "")
        text += (
            f"| {case['recipe']} | {case['size']} | {case['references']} | {how} | {r['predicted'] / 1e9:.2f} GB | {r['measured'] / 1e9:.2f} GB "
            f"| {r['ratio']:.3f} |\n"
        )
    where = content["circumstances"]
    return text + (
        f"\nThe tracker on real tensors gives the fake tensors' number to {max(abs(r['tracked_for_real'] / r['predicted'] - 1) for r in rows):.1%}; "
        f"what remains is scratch memory of kernels. Commit `{where['commit'][:12]}`, {where['device']}, torch {where['versions']['torch']}.\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, help="plan these, and keep what is recorded of the others"
    )
    parser.add_argument("--processes", type=int, default=6)
    arguments = parser.parse_args()
    from benchmarks.run import circumstances

    if not arguments.page:
        chosen, path = arguments.recipes or RECIPES, RESULTS / "plan.json"
        kept = json.loads(path.read_text())["plans"] if path.exists() else []
        found = [*(p for p in kept if p["recipe"] not in chosen), *plans(chosen, processes=arguments.processes)]
        found.sort(key=lambda plan: RECIPES.index(plan["recipe"]))
        content = {"what": __doc__, "circumstances": circumstances(), "plans": found}
        write(RESULTS / "plan.json", json.dumps(content, indent=1) + "\n")
    write(REPOSITORY / "docs" / "results" / "plan.md", page())


if __name__ == "__main__":
    main()
