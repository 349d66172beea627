"""GSPO, GRPO and guarded GRPO in stage 2: with and without routing replay, with experts and without, at the recipe's learning rate and at ten times it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from multicrafter.scoring.evaluate import bootstrap

from studies.lab.experiment import Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, cell, difference, markdown_table, mean_over_seeds, save_plot, spread

RATIOS = {"sequence": "GSPO", "step": "GRPO", "guarded": "guarded GRPO"}
MODELS = ("experts", "experts, routing replayed", "plain LoRA")
RATES = {"": 1.0, ", ten times the learning rate": 10.0}  # the recipe's, and one at which a policy can break
HASTY = (0,)  # seeds of the other rates: all broke, and the whole must fit in twelve hours
BEFORE = "before stage 2"
TRUTH = ("reward", "attributes", "identity", "swaps")
WINDOW = 4  # iterations at either end that are compared


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """Stage 2 from ONE first stage with experts and one without; the seed is stage 2's."""
    found: dict[str, dict[int, Experiment]] = {}
    rows = budget.rows(0)
    align = rows["ippo"][1]
    assert align is not None
    starts = {"experts": rows["moe"][0], "plain LoRA": rows["idar"][0]}
    for model, pretrain in starts.items():
        before = Experiment(pretrain=pretrain, tests=(budget.test(),))
        found[f"{BEFORE}, {model}"] = dict.fromkeys(budget.seeds, before)
    for (rate, factor), (name, title), model in product(RATES.items(), RATIOS.items(), MODELS):
        start, _, replayed = model.partition(", ")
        by = found[f"{title}, {model}{rate}"] = {}
        for seed in (s for s in budget.seeds if factor == 1 or s in HASTY):
            config = replace(
                align,
                lr=align.lr * factor,
                online=replace(align.online, seed=seed, policy=replace(align.online.policy, ratio=name)),  # type: ignore[arg-type]
                routing_replay=bool(replayed),
                routing_jitter=start == "experts",
            )
            by[seed] = Experiment(pretrain=starts[start], align=config, tests=(budget.test(),))
    return found


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """By arm: reward gained over the run and on unseen prompts, collapses, ratio spread, clipping, routing jitter; curves of every seed."""
    rows, curves = {}, {}
    for label, by in records.items():
        if label.startswith(BEFORE):
            continue
        before = records.get(f"{BEFORE}, {label.split(', ')[1]}", {})
        unseen = difference(by, before, "reward") if by.keys() & before.keys() else None
        history = {seed: r["curves"]["stage 2"] for seed, r in by.items()}
        reward = {s: [h["reward"] for h in run] for s, run in history.items()}
        gains = [np.mean(r[-WINDOW:]) - np.mean(r[:WINDOW]) for r in reward.values()]
        noise = (
            np.median([np.std(np.diff(r)) / np.sqrt(2) for r in reward.values()])
            if len(next(iter(reward.values()))) > 2
            else 0.0
        )
        rows[label] = {
            "gain": bootstrap(gains),
            "unseen": unseen,
            "collapsed": int(sum(g < -2 * noise for g in gains)),
            "runs": len(gains),
            **{
                name: _mean(h[key] for run in history.values() for h in run[1:] or run if key in h)
                for name, key in METRICS.items()
            },
            "tests": {n: mean_over_seeds(by, n) for n in ("attributes", "identity", "swaps", "text", "aesthetics")},
        }
        curves[label] = {str(s): r for s, r in reward.items()}
    against = {}
    for title, pairs in comparisons().items():
        a, b = (
            {(i, seed): r for i, pair in enumerate(pairs) for seed, r in records.get(pair[side], {}).items()}
            for side in (0, 1)
        )
        if a.keys() & b.keys():
            against[title] = {n: {"cases": difference(a, b, n), "runs": spread(a, b, n)} for n in TRUTH}
    return {"rows": rows, "reward": curves, "against": against}


def comparisons() -> dict[str, list[tuple[str, str]]]:
    """Pairs of labels that differ in the ratio alone, and in the replay alone: together, and one by one, each rate for itself."""
    found: dict[str, list[tuple[str, str]]] = {}
    for rate in RATES:
        several: dict[str, dict[str, tuple[str, str]]] = {}
        for ours in (RATIOS["sequence"], RATIOS["guarded"]):
            several[f"{ours} - {RATIOS['step']}"] = {
                m: (f"{ours}, {m}{rate}", f"{RATIOS['step']}, {m}{rate}") for m in MODELS
            }
        several["routing replayed - not"] = {
            t: (f"{t}, {MODELS[1]}{rate}", f"{t}, {MODELS[0]}{rate}") for t in RATIOS.values()
        }
        for title, pairs in several.items():
            found[title + rate] = list(pairs.values())
            found |= {f"{title}, {k}{rate}": [pair] for k, pair in pairs.items()}
    return found


def _mean(values: Iterable[float]) -> float | None:
    """None of nothing; NaN (nothing to clip, no experts) is left out."""
    there = [v for v in values if not np.isnan(v)]
    return float(np.mean(there)) if there else None


METRICS = {
    "ratio spread": "ratio_spread",
    "clip fraction": "clip_fraction",
    "approximate KL": "approx_kl",
    "routing jitter": "routing_jitter",
}


def page(content: dict[str, Any], folder: Path) -> str:
    """Curves, and a table."""
    from matplotlib.figure import Figure

    rates = [r for r in RATES if not r or any(label.endswith(r) for label in content["reward"])]
    figure = Figure(figsize=(11, 3.2 * len(rates)), layout="constrained")
    axes = figure.subplots(len(rates), len(MODELS), sharex=True, sharey=True, squeeze=False)
    colours = dict(zip(RATIOS.values(), ("tab:blue", "tab:red", "tab:green"), strict=True))
    for (row, rate), (column, model), title in product(enumerate(rates), enumerate(MODELS), colours):
        axis = axes[row][column]
        axis.set_title(model + rate, fontsize=9)
        if runs := content["reward"].get(f"{title}, {model}{rate}"):
            array = np.array(list(runs.values()))
            axis.plot(array.T, color=colours[title], alpha=0.25, linewidth=0.8)
            axis.plot(array.mean(0), color=colours[title], linewidth=2, label=title)
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    for row in axes:
        row[0].set_ylabel("reward of the rollouts")
        row[0].legend(fontsize=8)
    save_plot(figure, folder / "ratios.png")

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2e}"

    def gain(row: dict[str, Any]) -> str:
        return cell(row["gain"], "+.3f") if row["runs"] > 1 else f"{row['gain']['mean']:+.3f}"

    table = [
        [label, cell(r["unseen"], "+.3f"), gain(r), f"{r['collapsed']} of {r['runs']}", *(number(r[n]) for n in METRICS), *(cell(r["tests"][n]) for n in ("attributes", "identity"))]
        for label, r in content["rows"].items()
    ]  # fmt: skip
    pairwise = [
        [label, *(f"{cell(m[n]['cases'], '+.3f')}; {sum(x > 0 for x in m[n]['runs'])} of {len(m[n]['runs'])}" for n in TRUTH)]
        for label, m in content["against"].items()
    ]  # fmt: skip
    return f"""All runs of a kind start from one first stage; seeds are stage 2's. Unseen: what the reward of unseen prompts and people gained, interval over cases. Gain: reward of the
rollouts of the last {WINDOW} iterations minus that of the first {WINDOW}, on other prompts, interval over seeds. A run collapsed if it lost more than twice its
own iteration-to-iteration noise. Routing jitter: share of the tokens (in the window's first step, all layers) that the updated policy would send to another expert.
Ten times the recipe's learning rate, one seed, is there to see what breaks; its intervals over cases do not say how much another seed would change.

![reward by iteration: thin lines are seeds, thick ones their mean](ratios.png)

{markdown_table(["", "unseen", "gain", "collapsed", *METRICS, "attributes", "identity"], table)}

Runs that differ in one thing, on unseen prompts and people: interval over cases, averaged over the pairs of runs; in how many pairs of runs the difference is above 0.
The interval says how other people would have come out, the pairs how other seeds would: mind both.

{markdown_table(["", *TRUTH], pairwise)}"""


STUDY = Study(
    name="ratios", title="GSPO, GRPO, guarded GRPO, and the routing", arms=arms, summarise=summarise, page=page
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
