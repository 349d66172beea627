"""Writes docs/results/objectives.md and its plot from what `studies.objectives` has recorded."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from gspo.examples.closed_form import GROUPS, MEMBERS, NUM_STEPS
from gspo.plot import pyplot
from multicrafter.files import write_whole

from studies.lab.measurements import read_runs

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "gspo": "GSPO", "grpo": "GRPO", "guarded": "GRPO-Guard", "dppo": "divergence mask", "nft": "DiffusionNFT", "awm": "AWM",
    "refl": "ReFL", "draft": "DRaFT-K",
}  # fmt: skip
COLORS = {
    "gspo": "tab:blue", "grpo": "tab:cyan", "guarded": "tab:purple", "dppo": "tab:green", "nft": "tab:red", "awm": "tab:orange",
    "refl": "tab:gray", "draft": "black",
}  # fmt: skip
TUNING_SEED = 100
OFF, LONGER = 2.0, 4
"""A method that is farther from the optimum than so many standard errors is run again, with so many times the evaluations."""


def chosen(runs: list[dict], task: str, method: str, times: int = 1) -> tuple[dict, list[dict]]:
    """The setting that tuning chose, and its runs on the other seeds, with ``times`` the evaluations."""
    budget = min(r["budget"] for r in runs)
    mine = [r for r in runs if r["task"] == task and r["setting"]["method"] == method]
    tuning = [r for r in mine if r["seed"] == TUNING_SEED]
    best = min(tuning, key=lambda r: r["score"] if math.isfinite(r["score"]) else math.inf)
    return best, [
        r
        for r in mine
        if r["setting"] == best["setting"] and r["seed"] != TUNING_SEED and r["budget"] == times * budget
    ]


class Distance(NamedTuple):
    """How far the mean over seeds is from the optimum.

    Attributes:
        mean: Root mean square, over parameters, of the mean error.
        error: Root mean square of the standard errors of those means: what ``mean`` is expected to be without any bias.
    """

    mean: float
    error: float

    @property
    def deviation(self) -> float:
        """``mean`` in standard errors."""
        return self.mean / self.error


def distance(found: list[dict]) -> Distance:
    """Of the runs of one method."""
    columns = list(zip(*(r["error"] for r in found), strict=True))
    means = [statistics.fmean(values) for values in columns]
    errors = [statistics.stdev(values) / math.sqrt(len(values)) for values in columns]
    return Distance(math.hypot(*means) / math.sqrt(len(means)), math.hypot(*errors) / math.sqrt(len(means)))


def middle(found: list[dict], name: str) -> str:
    """Median of function evaluations to a level, in thousands; how many seeds reached it, if not all."""
    reached = [r[name] for r in found if r[name] is not None]
    if len(reached) <= len(found) // 2:
        return f"not reached by {len(found) - len(reached)} of {len(found)}"
    return f"{statistics.median(reached) / 1000:.0f}"


def knobs(setting: dict, method: str) -> str:
    """What tuning chose."""
    own = {
        "gspo": ("own_starts",), "grpo": ("own_starts",), "guarded": ("own_starts",), "dppo": ("own_starts",),
        "nft": ("weighting",), "awm": ("weighting",), "refl": ("refl_from",), "draft": ("last_steps",),
    }[method]  # fmt: skip
    words = {"own_starts": lambda v: "own starts" if v else "shared starts", "weighting": lambda v: f"weighting {v}".replace("_", "-"),
             "refl_from": lambda v: f"steps from {v:g}", "last_steps": lambda v: f"K = {v}"}  # fmt: skip
    return ", ".join([f"lr {setting['lr']:g}", *(words[name](setting[name]) for name in own)])


def seconds_to(found: list[dict], name: str) -> str:
    """Processor seconds of training until a level, at the mean pace of the run."""
    reached = [r["seconds"] * r[name] / r["evaluations"][-1] for r in found if r[name] is not None]
    return f"{statistics.median(reached):.2f}" if len(reached) > len(found) // 2 else ""


def table(runs: list[dict], task: str) -> str:
    """One world."""
    lines = [
        "| method | tuned to | regret at the end | thousand evaluations to a tenth | to a hundredth | seconds to a tenth | to a hundredth "
        "| distance | in standard errors | seconds in all |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, name in NAMES.items():
        best, found = chosen(runs, task, method)
        last, away = [r["last_regret"] for r in found], distance(found)
        lines.append(
            f"| {name} | {knobs(best['setting'], method)} | {statistics.fmean(last):.1e} "
            f"(± {statistics.stdev(last) / math.sqrt(len(last)):.0e}) | {middle(found, 'to_tenth')} | {middle(found, 'to_hundredth')} "
            f"| {seconds_to(found, 'to_tenth')} | {seconds_to(found, 'to_hundredth')} | {away.mean:.1e} | {away.deviation:.1f} "
            f"| {statistics.fmean(r['seconds'] for r in found):.1f} |"
        )
    return "\n".join(lines) + "\n"


def tuning(runs: list[dict]) -> str:
    """How sensitive each method is: regret of every setting of the grid."""
    lines = ["| world | method | setting | .01 | .03 | .1 |", "| --- | --- | --- | --- | --- | --- |"]
    for task in dict.fromkeys(r["task"] for r in runs):
        for method, name in NAMES.items():
            mine = [
                r for r in runs if r["task"] == task and r["setting"]["method"] == method and r["seed"] == TUNING_SEED
            ]
            by: dict[str, dict[float, float]] = {}
            for r in mine:
                by.setdefault(knobs(r["setting"], method).partition(", ")[2], {})[r["setting"]["lr"]] = r["score"]
            for setting, scores in by.items():
                cells = " | ".join(f"{scores[lr]:.0e}" if lr in scores else "" for lr in (0.01, 0.03, 0.1))
                lines.append(f"| {task} | {name} | {setting} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict], path: Path) -> None:
    """Regret over function evaluations: median of the seeds, and their range."""
    plt = pyplot()
    tasks = list(dict.fromkeys(r["task"] for r in runs))
    figure, axes = plt.subplots(1, len(tasks), figsize=(11, 4.2), constrained_layout=True)
    for task, ax in zip(tasks, axes, strict=True):
        for method, name in NAMES.items():
            _, found = chosen(runs, task, method)
            length = min(len(r["regrets"]) for r in found)
            x = [e / 1000 for e in found[0]["evaluations"][:length]]
            columns = list(zip(*(r["regrets"][:length] for r in found), strict=True))
            floor = 1e-6
            ax.plot(
                x, [max(statistics.median(c), floor) for c in columns], label=name, color=COLORS[method], linewidth=1.6
            )
            ax.fill_between(
                x, [max(min(c), floor) for c in columns], [max(max(c), floor) for c in columns], color=COLORS[method],
                alpha=0.12, linewidth=0,
            )  # fmt: skip
        ax.set(title=task, xlabel="thousand function evaluations", yscale="log", ylim=(1e-6, None))
        ax.set_ylabel("regret: best mean reward minus the policy's")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def origin(data: dict, module: str = "studies.objectives run") -> str:
    """The line under the tables."""
    c = data["circumstances"]
    versions = ", ".join(f"{k} {v}" for k, v in c["versions"].items() if k != "diffusers")
    changed = " (modified)" if c["modified"] else ""
    command = module if module.startswith("python ") else f"python -m {module}"
    return f"`{command}` at {c['commit'][:10]}{changed}, {versions}, {c['device']}, {c['threads']} thread."


def overhead(path: Path) -> str:
    """What the trainer adds to the passes, from `bench_gspo_objectives.py`."""
    if not path.exists():
        return ""
    data = json.loads(path.read_text())
    rows = [
        f"| {r['what']} | {r['bare_ms']:.1f} | {r['own_ms']:.1f} ({r['own_quartiles_ms'][0]:.1f} to {r['own_quartiles_ms'][1]:.1f}) "
        f"| {r['own_ms'] / r['bare_ms']:.1%} | {r['ratio']:.3f} ({r['quartiles'][0]:.3f} to {r['quartiles'][1]:.3f}) | {r['rounds']} |"
        for r in data["rows"]
    ]
    return (
        "\n## Overhead\n\nOne update against the same forward and backward passes of the model alone, both in turns within a round; processor time, median and quartiles "
        f"of the ratios. The model is four layers of attention, {data['parameters'] / 1e6:.1f} million parameters, on 32 samples of 64 tokens.\n\n"
        "*Own* is what an update takes beyond its passes with a model of as many parameters whose passes cost next to nothing: all that the trainer does "
        "itself. Two timings of real passes differ by more than that, as the quartiles of the ratio say.\n\n"
        "| what | passes alone, ms | own, ms | share | update / passes | rounds |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n\n"
        + origin(data, data["circumstances"]["command"].removeprefix("python -m "))
        + "\n"
    )


def why(runs: list[dict], task: str, method: str) -> str:
    """What longer runs say of a method that is off."""
    before, after = (distance(chosen(runs, task, method, times)[1]) for times in (1, LONGER))
    longer = f"with {LONGER} times the evaluations it is at {after.mean:.1e}, {after.deviation:.1f} standard errors"
    if after.deviation <= OFF:
        return f"more evaluations bring it there: {longer}"
    return f"it is still on its way: {longer}" if after.mean < before.mean / 2 else f"it stays off: {longer}"


def conclusions(runs: list[dict]) -> list[str]:
    """What the numbers say: within two standard errors of the optimum, or why not."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in runs):
        away = {method: distance(chosen(runs, task, method)[1]) for method in NAMES}
        off = [method for method, found in away.items() if found.deviation > OFF]
        lines.append(
            f"In the {task} world {len(NAMES) - len(off)} of {len(NAMES)} methods end within two standard errors of the optimum."
        )
        lines += [
            f"{NAMES[m]} does not, in the {task} world ({away[m].mean:.1e}, {away[m].deviation:.1f} standard errors); {why(runs, task, m)}."
            for m in off
        ]
    return lines


def write(source: Path, docs: Path, also: str = "") -> None:
    """The page and the plot; ``also`` is what stands below."""
    runs = list(read_runs(source).values())
    docs.mkdir(parents=True, exist_ok=True)
    plot(runs, docs / "objectives.png")
    total = sum(r["seconds"] for r in runs)
    seeds = len(chosen(runs, runs[0]["task"], "gspo")[1])
    parts = [
        "# Objectives of policy optimization, compared\n",
        "Generated by `python -m studies.objectives page` from `benchmarks/results/objectives.parquet`.\n",
        "Which objective comes how far, at the same number of function evaluations? Three answers stand here. In two small worlds the best policy is known on paper. A tiny FLUX learns [redder pictures](#a-tiny-flux-and-redder-pictures). And in the drawn world every method is paid by [stage 2's own reward](#the-drawn-world-and-its-composite-reward), which can be gamed.\n",
        "A policy of the small worlds is the exact flow to a mixture of Gaussians, and the mixture's parameters are trained. "
        "`python -m gspo.examples.closed_form` runs any of these methods in seconds.\n",
        "GSPO (the ratio of the sequence), GRPO (a ratio a step), GRPO-Guard and the divergence mask of Flow-DPPO raise the likelihood of a stochastic sampler's steps. DiffusionNFT and AWM (advantage-weighted matching) draw the velocity towards good samples and need no likelihood. "
        "ReFL and DRaFT-K follow the gradient of the reward through one or the last K steps ([how to use them](../packages/gspo.md)).\n",
        "![Regret over function evaluations](objectives.png)\n",
        "## Where the optimum is known\n",
        "\n".join(f"- {line}" for line in [*conclusions(runs), *remarks(runs)]) + "\n",
        "These worlds are easy: the reward is smooth, known everywhere, and cannot be gamed. Methods that use its gradient are at home here, which says nothing about a learned reward ([reward hacking](reward_hacking.md)).\n",
        "## Gaussian\n",
        "One Gaussian in four dimensions, whose mean is trained; the reward is `-|x - c|^2 / 2`. Optimum: mean = c. The reward of single samples keeps its spread there, so a method ends with the noise that its learning rate lets through.\n",
        table(runs, "gaussian"),
        "## Mixture\n",
        "Four Gaussians in the plane; weights, means and widths are trained. The reward is quadratic, minus the KL to the base, which is part of the reward as `log base(x) - log policy(x)`. Optimum: the base times `exp(reward)`, again four Gaussians. At the "
        "optimum the reward is the same for every sample, so every method has its rest there, whatever the sampler's error.\n",
        table(runs, "mixture"),
        "## How it was measured\n",
        f"Every run has {min(r['budget'] for r in runs):,} function evaluations: rows for which the velocity is computed, drawing and updating together; a backward pass is not counted, which favours methods with many of them, so the tables have processor seconds too. An iteration draws {GROUPS} groups of {MEMBERS} samples in {NUM_STEPS} steps. "
        "All methods use Adam with a rate that falls linearly to 0, advantages normalised in their group, and no norm clipping. Ratio methods have a window of two steps that slides by one every iteration, two inner epochs, and (but for the mask) a measured clip range; the mask's threshold "
        "is .01 nats per element. DiffusionNFT's old policy follows at half speed.\n",
        f"Every method was tuned on one seed over six settings: three learning rates times two values of a knob of its own. The setting with the lowest regret over the last tenth of the run was then run on {seeds} other seeds, which are what the tables show. "
        "*Regret* is the best mean reward minus the policy's, exact. *A tenth* and *a hundredth* are those of the first regret; the median over the seeds is shown. *Distance* is the mean error over the seeds, root mean square over the parameters (coordinates, log weights, log widths). "
        "*In standard errors*: divided by the root mean square of the standard errors of these means, so about 1 without bias; a method above 2 was run again with four times the evaluations, to tell one that is off from one that has not arrived. Methods share seeds, so their errors are not independent of one another.\n",
        "### The grid\n",
        "Regret over the last tenth of the run, tuning seed, by learning rate. What was best at the edge of its grid might be better beyond it.\n",
        tuning(runs),
        f"{origin(runs[0])} {len(runs)} runs, {total / 60:.1f} minutes of processor time, on a machine that others used too.\n",
    ]
    page = "\n".join(parts) + also + overhead(ROOT / "benchmarks" / "results" / "gspo_objectives_overhead.json")
    write_whole(docs / "objectives.md", page)


def remarks(runs: list[dict]) -> list[str]:
    """Comparisons that the tables invite."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in runs):
        cost = {}
        for method in NAMES:
            _, found = chosen(runs, task, method)
            reached = [r["to_tenth"] for r in found if r["to_tenth"] is not None]
            if len(reached) > len(found) // 2:
                cost[method] = statistics.median(reached)
        if "gspo" in cost:
            parts = [f"{NAMES[m]} {cost['gspo'] / c:.1f}" for m, c in cost.items() if m != "gspo"]
            lines.append(
                f"Times fewer function evaluations than GSPO to a tenth of the first regret, {task}: {', '.join(parts)}."
            )
    return lines
