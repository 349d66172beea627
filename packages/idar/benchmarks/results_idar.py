# ruff: noqa: E501
"""Writes docs/results/idar_cost.md and idar_losses.md (and their pictures) from benchmarks/results/idar_*.json.

python packages/idar/benchmarks/results_idar.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
R2I, I2R = "reference_to_image", "image_to_reference"
SHORT = {R2I: "reference queries", I2R: "image queries"}


def verdict(value: float, limit: float, *, most: bool) -> str:
    met = value <= limit if most else value >= limit
    return f"{'at most' if most else 'at least'} {limit:g}: {'met' if met else 'missed'}"


def cost() -> None:
    report = json.loads((RESULTS / "idar_cost.json").read_text())
    blocks, maps, references, where = (report[k] for k in ("blocks", "maps", "references", "circumstances"))
    rows = []
    for d in (R2I, I2R):
        ratio = blocks[f"time_ratio_{d}"]
        fastest = min(b for _, b in blocks["pairs"][d]) / min(a for a, _ in blocks["pairs"][d])
        spread = f"{ratio['min']:.3f} to {ratio['max']:.3f}; fastest runs {fastest:.3f}"
        rows.append(
            f"| time with / without, three blocks, {SHORT[d]} | {ratio['median']:.3f} | {spread} | {ratio['runs']} "
            f"| {verdict(ratio['median'], 1.03, most=True)} |"
        )
    for d in (R2I, I2R):
        if f"memory_ratio_{d}" in blocks:
            ratio = blocks[f"memory_ratio_{d}"]
            alone = f"{blocks[f'activation_memory_ratio_{d}']:.4f} without the weights"
            rows.append(
                f"| peak bytes with / without, {SHORT[d]} | {ratio:.4f} | {alone} | 1 | {verdict(ratio, 1.02, most=True)} |"
            )
    for d in (R2I, I2R):
        speed = maps[f"speedup_{d}"]
        fastest = min(a for a, _ in maps["pairs"][d]) / min(b for _, b in maps["pairs"][d])
        spread = f"{speed['min']:.2f} to {speed['max']:.2f}; fastest runs {fastest:.2f}"
        rows.append(
            f"| materialised / streaming, time, {SHORT[d]} | {speed['median']:.2f} | {spread} | {speed['runs']} "
            f"| {verdict(speed['median'], 1.8, most=False)} |"
        )
    for d in (R2I, I2R):
        extra = {k: f"{v / 1e6:.1f} MB" for k, v in maps[f"extra_bytes_{d}"].items()}
        rows.append(
            f"| materialised / streaming, extra bytes, {SHORT[d]} | {maps[f'memory_ratio_{d}']:.1f} "
            f"| {extra['materialised']} and {extra['streaming']} | 1 | {verdict(maps[f'memory_ratio_{d}'], 10, most=False)} |"
        )
    lines = []
    for d in (R2I, I2R):
        least = [min(v) for v in references["seconds"][d].values()]
        fit = references[f"fit_{d}"]
        cells = " | ".join(f"{1000 * s:.0f}" for s in least)
        lines.append(f"| {SHORT[d]} | {cells} | {1000 * fit['seconds_per_reference']:.0f} | {fit['r_squared']:.3f} |")
    runs = len(next(iter(references["seconds"][R2I].values())))
    size = where["size"]
    text = f"""# What attention supervision costs

One double and two single blocks of FLUX at full width ({size["heads"]} heads of {size["head_dim"]}), {size["text"]} text, {size["image"]} image and two times {size["reference"]} reference tokens, fp32,
{where["threads"]} threads, {where["device"]}, torch {where["versions"]["torch"]}, diffusers {where["versions"]["diffusers"]}. Weights are frozen and gradients go to the tokens, as when adapters train: the stricter denominator. Every run is timed
beside its baseline in the same process; ratios are of neighbours. Bytes are counted by the allocator (torch's profiler), not sampled.
Made by `packages/idar/benchmarks/results_idar.py` from `benchmarks/results/idar_cost.json`, measured by `packages/idar/benchmarks/bench_idar_cost.py`
(code as of commit `{where["commit"][:10]}`). The machine was shared; a benchmark stopped its neighbours while it ran, as far as it could see them.

| figure | median | spread | runs | wanted |
|---|---|---|---|---|
{chr(10).join(rows)}

Materialised maps are the definition (`idar.reference`): the same queries and keys, all heads at once, differentiated by autograd. Extra bytes are those above the two gradients that both must return.

## Number of references

Milliseconds for maps and gradients of one block, {size["reference"]} tokens each, least of {runs} runs:

| | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | per reference | R² of a line |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}


![references](idar_references.png)
"""
    (DOCS / "idar_cost.md").write_text(text)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for d, color in ((R2I, "tab:orange"), (I2R, "tab:blue")):
        least = [min(v) for v in references["seconds"][d].values()]
        fit = references[f"fit_{d}"]
        axes.plot(range(1, 9), least, "o", color=color, label=SHORT[d])
        axes.plot(
            [0, 8],
            [fit["seconds_without"] + fit["seconds_per_reference"] * n for n in (0, 8)],
            color=color,
            linewidth=0.8,
        )
    axes.set_xlabel("references of 400 tokens")
    axes.set_ylabel("seconds, forward and backward")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    figure.savefig(DOCS / "idar_references.png", dpi=120)


def losses() -> None:
    report = json.loads((RESULTS / "idar_losses.json").read_text())
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    runs = sorted(report["runs"], key=lambda r: (r["coef"], r["measured"][I2R]["leakage"]))
    rows = []
    for run in runs:
        m = run["measured"]
        cells = [f"{mean(m[d][k]):.3f}" for d in (R2I, I2R) for k in ("leakage", "map_iou", "peak_in_mask")]
        rows.append(f"| {run['form']} | {run['coef']:g} | {mean(m['diffusion_loss']):.4f} | {' | '.join(cells)} |")
    sigmas = report["runs"][0]["measured"]["sigmas"]
    chosen = [r for r in runs if r["coef"] in (0, 0.3)]
    profile = [f"| {r['form']} | {' | '.join(f'{v:.3f}' for v in r['measured'][I2R]['leakage'])} |" for r in chosen]
    first = report["runs"][0]
    text = f"""# Forms of the attention loss

Short stage-1 runs on the shipped tiny FLUX: {first["steps"]} steps of {first["batch"]} scenes of two people, plain LoRA, everything but the loss the same; one seed. Measured on {first["held_out"]} scenes of
unseen people, mean over the noise levels {", ".join(f"{s:g}" for s in sigmas)}. It shows in which direction attention starts to move; it says nothing about pictures, and differences of a few thousandths are within what another seed would change.
Made by `packages/idar/benchmarks/results_idar.py` from `benchmarks/results/idar_losses.json` ({report["device"]}; commit `{report["commit"][:10]}`; `{report["command"]}`).

`r2i` supervises maps of reference queries, `i2r` of image queries. Columns: leakage (lower is better, .5 is blind), IoU of map and mask, peak inside the mask, each for both directions.

| form | coefficient | diffusion loss | r2i leakage | r2i IoU | r2i peak | i2r leakage | i2r IoU | i2r peak |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Runs that were planned at coefficient 1 and are not in the table did not fit into the session.

## Leakage of image queries by noise level

| form | {" | ".join(f"{s:g}" for s in sigmas)} |
|---|{"---|" * len(sigmas)}
{chr(10).join(profile)}

What was decided from this: [0021](../adr/0021-forms-of-the-attention-loss.md), [0023](../adr/0023-sigma-weight.md).
"""
    (DOCS / "idar_losses.md").write_text(text)


if __name__ == "__main__":
    cost()
    losses()
