"""What the page of objectives says of the drawn world: differences to the adapter that every method starts from, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gspo.plot import pyplot
from multicrafter.scoring.evaluate import Interval, difference

from studies.lab.measurements import read_runs
from studies.objectives_page import COLORS, NAMES, origin

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
SHOWN = ("reward", "text", "aesthetics", "identity", "identity_watched", "attributes", "count", "swaps")
UNSEEN = ("attributes", "count", "swaps")
"""What the reward does not look at: the reader of truth says it."""
Runs = Mapping[str, Mapping[str, Any]]


def name_of(start: str, method: str, lr: float, seed: int, budget: int) -> str:
    """What decides a run."""
    return f"{start}, {method}, lr {lr:g}, seed {seed}, {budget} evaluations"


def _mean(run: Mapping[str, Any], name: str = "reward") -> float:
    return float(np.nanmean(np.asarray(run["cases"][name], float)))


def tuned_on(runs: Runs, start: str) -> str:
    """The start whose validation runs chose the rates: this one, or the first of all where this one has none."""
    tuned = [name.partition(", ")[0] for name in runs if f"seed {TUNING_SEED}," in name]
    return start if start in tuned or not tuned else tuned[0]


def best_rate(runs: Runs, start: str, method: str, budget: int) -> float | None:
    """The rate with the best reward on validation cases; None while one is missing."""
    tuned = tuned_on(runs, start)
    names = {lr: name_of(tuned, method, lr, TUNING_SEED, budget) for lr in LEARNING_RATES}
    if any(name not in runs for name in names.values()):
        return None
    return max(names, key=lambda lr: _mean(runs[names[lr]]))


def found_of(runs: Runs, start: str, method: str, budget: int) -> list[Mapping[str, Any]]:
    """The runs of a method's best rate on the seeds of the comparison."""
    rate = best_rate(runs, start, method, budget)
    if rate is None:
        return []
    head, tail = name_of(start, method, rate, 0, budget).split("seed 0")
    return [r for n, r in runs.items() if n.startswith(head) and n.endswith(tail) and f"seed {TUNING_SEED}," not in n]


def differences(runs: Runs, start: str, found: list[Mapping[str, Any]]) -> dict[str, Interval]:
    """Minus the adapter before, case by case; a case is averaged over the seeds first."""
    before = {name: np.asarray(v, float) for name, v in runs[f"{start}, before, test"]["cases"].items()}
    after = {name: np.mean([np.asarray(r["cases"][name], float) for r in found], 0) for name in SHOWN}
    return difference(after, before)


def games(found: Mapping[str, Interval]) -> list[str]:
    """Which of what the reward does not see became worse while it rose."""
    if found["reward"].low <= 0:
        return []
    worse = {name: found[name].low > 0 if name == "swaps" else found[name].high < 0 for name in UNSEEN}
    return [name for name, is_worse in worse.items() if is_worse]


def _signed(interval: Interval) -> str:
    text = f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text


def _seconds(found: list[Mapping[str, Any]]) -> float:
    return float(np.mean([r["curve"][-1][1] for r in found]))


def one_machine(runs: Runs, start: str, methods: list[str], budget: int) -> bool:
    """Whether all runs of a start were made on one kind of processor, as far as they say; those that do not, at one commit."""
    made = [run["circumstances"] for method in methods for run in found_of(runs, start, method, budget)]
    return len({where.get("processor", where["commit"]) for where in made}) == 1


def table(runs: Runs, start: str, methods: list[str], budget: int) -> str:
    """A method a row."""
    lines = [
        "| method | learning rate | runs | pictures | seconds | " + " | ".join(SHOWN) + " |",
        "|" + " --- |" * (5 + len(SHOWN)),
    ]
    cells = " | ".join(f"{_mean(runs[f'{start}, before, test'], name):.3f}" for name in SHOWN)
    lines.append(f"| before | | | | | {cells} |")
    timed = one_machine(runs, start, methods, budget)
    for method in methods:
        found = found_of(runs, start, method, budget)
        cells = " | ".join(_signed(differences(runs, start, found)[name]) for name in SHOWN)
        pictures = np.mean([r["pictures"] for r in found])
        lines.append(
            f"| {NAMES[method]} | {best_rate(runs, start, method, budget):g} | {len(found)} | {pictures:,.0f} | {f'{_seconds(found):.0f}' if timed else '-'} | {cells} |"
        )
    return "\n".join(lines)


def grid(runs: Runs, start: str, methods: list[str], budget: int) -> str:
    """Reward on validation cases by rate."""
    lines = [
        "| method | " + " | ".join(f"{lr:g}" for lr in LEARNING_RATES) + " |",
        "|" + " --- |" * (1 + len(LEARNING_RATES)),
    ]
    for method in methods:
        rewards = [_mean(runs[name_of(start, method, lr, TUNING_SEED, budget)]) for lr in LEARNING_RATES]
        lines.append(f"| {NAMES[method]} | " + " | ".join(f"{r:.3f}" for r in rewards) + " |")
    return "\n".join(lines)


def plot(runs: Runs, complete: Mapping[str, list[str]], budget: int, path: Path) -> None:
    """Left what the reward sees, then what it does not; right what the same evaluations took, the first method's time being 1, where
    one machine made them all. A start is a marker.
    """
    plt = pyplot()
    shown = ("reward", *UNSEEN)
    methods = [m for m in NAMES if any(m in found for found in complete.values())]
    size = (12, (0.3 + 0.15 * len(complete)) * len(methods) + 1.6)
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=size, sharey=True, constrained_layout=True)
    for number, (start, those) in enumerate(complete.items()):
        filled, marker = "full" if number == 0 else "none", "osD^"[number % 4]
        axes[0].plot([], [], marker=marker, fillstyle=filled, linestyle="", color="0.3", label=f"stage 1 {start}")
        for method in those:
            row = methods.index(method) + (number - (len(complete) - 1) / 2) * 0.7 / len(complete)
            found, color = found_of(runs, start, method, budget), COLORS[method]
            gained = differences(runs, start, found)
            for name, ax in zip(shown, axes, strict=False):
                value = gained[name]
                ax.plot([value.low, value.high], [row, row], color=color, linewidth=2, alpha=1 if number == 0 else 0.5)
                ax.plot([value.mean], [row], marker=marker, fillstyle=filled, color=color)
            if one_machine(runs, start, those, budget):
                height = 0.5 / len(complete)
                took = _seconds(found) / _seconds(found_of(runs, start, those[0], budget))
                axes[-1].barh(row, took, color=color if number == 0 else "none", edgecolor=color, height=height)
    for name, ax in zip(shown, axes, strict=False):
        ax.axvline(0, color="0.6", linewidth=1)
        better = "less is better" if name == "swaps" else "more is better"
        ax.set_title(f"{name}\n({better})", fontsize=10)
    axes[0].set(yticks=range(len(methods)), yticklabels=[NAMES[m] for m in methods])
    axes[0].invert_yaxis()
    axes[-1].set_title(f"processor time\n({NAMES[methods[0]]} = 1)", fontsize=10)
    if len(complete) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("difference to the adapter before, 95 % intervals", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def conclusions(runs: Runs, start: str, methods: list[str], budget: int) -> str:
    """By the criteria of `studies.objectives_world`."""
    gained = {m: differences(runs, start, found_of(runs, start, m, budget)) for m in methods}
    moved = [m for m in methods if gained[m]["reward"].low > 0]
    lines = [
        f"{', '.join(NAMES[m] for m in moved)} raised the reward beyond its interval"
        if moved
        else "No method raised the reward beyond its interval"
    ]
    still = [NAMES[m] for m in methods if m not in moved]
    if moved and still:
        lines[0] += f", {', '.join(still)} did not"
    fell = [NAMES[m] for m in methods if gained[m]["reward"].high < 0]
    if fell:
        lines.append(f"{', '.join(fell)} lowered it")
    for method in moved:
        if worse := games(gained[method]):
            lines.append(f"{NAMES[method]} games it: {' and '.join(worse)} became worse")
    if moved and not any(games(gained[m]) for m in moved):
        lines.append(
            "None of those that raised it gamed it: attributes, count and swaps became no worse beyond their intervals"
        )
    return "\n".join(f"- {line}." for line in lines)


def section(source: Path, docs: Path) -> str:
    """Its part of the page, and the plot; nothing where no method is complete."""
    runs: Runs = read_runs(source)
    budget = min((int(n.rsplit(", ", 1)[1].split()[0]) for n in runs if n.endswith(" evaluations")), default=0)
    starts = [n.removesuffix(", before, test") for n in runs if n.endswith(", before, test")]
    starts.sort(key=lambda start: tuned_on(runs, start) != start)
    every = {s: [m for m in NAMES if len(found_of(runs, s, m, budget)) >= 2] for s in starts}
    complete = {s: methods for s, methods in every.items() if methods}
    parts: list[str] = []
    for start, methods in complete.items():
        tuned = tuned_on(runs, start)
        rates = f"Learning rates are those that were chosen {tuned}."
        if tuned == start:
            rates = f"Rewards on 64 validation cases by learning rate, from which the rates were chosen:\n\n{grid(runs, start, methods, budget)}"
        if not one_machine(runs, start, methods, budget):
            rates = f"These runs were made on more than one kind of machine, so their seconds are not compared. {rates}"
        parts.append(
            f"### Stage 1 {start}\n\n{conclusions(runs, start, methods, budget)}\n\n{table(runs, start, methods, budget)}\n\n"
            f"Differences to the row *before*, over the runs, each with a training seed of its own; bold where the interval excludes 0. {rates}\n\n"
            f"{origin(dict(runs[f'{start}, before, test']), 'studies.objectives_world run')}\n"
        )
    if not parts:
        return ""
    plot(runs, complete, budget, docs / "objectives_world.png")
    cases = len(runs[f"{starts[0]}, before, test"]["cases"]["reward"])
    return f"""
## The drawn world, and its composite reward

The reward of stage 2 is learned judges' opinion of text, aesthetics and identity, and can be gamed. Each method starts from an adapter of 320 steps of stage 1 and spends {budget:,} function evaluations, 2 to 6 minutes of a core. Evaluations are rows of every forward pass of the transformer, drafts, drawing and updates alike. The reader of truth then counts what the reward does not see: attributes, people, and swaps.

![Reward, and what it does not see](objectives_world.png)

ReFL follows the composite reward's own gradient: who was found and who is whom is held, and the cosines are differentiated. Ratio methods draw as the recipe does (a window at the first two of 16 steps), with two inner epochs, without which GSPO, GRPO and GRPO-Guard are one method. The others draw in 8 steps of a solver. An iteration has 8 groups of 8 pictures. The rate falls linearly to 0, and averaged weights are tested, bound by a draft, on {cases} test cases. Seconds compare the methods of one table; two tables may come from different machines.

{chr(10).join(parts)}"""
