"""Reward hacking: policies trained on several identity rewards, and what becomes of the attributes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from multicrafter.world.rewards import RewardConfig

from studies.lab.experiment import Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, cell, compare, forest, markdown_table, save_plot, tables

NAMES = ("attributes", "identity", "swaps", "count", "text", "aesthetics")
REWARDS = {
    "Hungarian, with penalties": RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0),
    "Hungarian": RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0, extra_penalty=0.0),
    "Hungarian, off-pair penalty": RewardConfig(
        text=0.0, aesthetics=0.0, multi_id=1.0, extra_penalty=0.0, off_pair_penalty=0.5
    ),
    "Hungarian, copying costs": RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0, extra_penalty=0.0, copy_paste=0.5),
    "UMO": RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0, extra_penalty=0.0, convention="umo"),
    "best face (XVerse)": RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0, extra_penalty=0.0, convention="xverse"),
    "mean": RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0, extra_penalty=0.0, convention="mean"),
}
BEFORE = "before stage 2"
OURS = "Hungarian"


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """Identity alone is the reward: what else a picture needs cannot hide a hack. One first stage; the seed is stage 2's."""
    rows = budget.rows(0)
    align = rows["ippo"][1]
    assert align is not None
    found = {BEFORE: {s: Experiment(pretrain=rows["moe"][0], tests=(budget.test(),)) for s in budget.seeds}}
    for label, reward in REWARDS.items():
        found[label] = {
            seed: Experiment(
                pretrain=rows["moe"][0],
                align=replace(align, online=replace(align.online, seed=seed), reward=reward),
                tests=(budget.test(),),
            )
            for seed in budget.seeds
        }
    return found


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Differences to the model before stage 2 and to the Hungarian policy, and the reward that each policy maximised."""
    curves = {
        label: {str(s): [h["reward"] for h in r["curves"]["stage 2"]] for s, r in by.items()}
        for label, by in records.items()
        if label != BEFORE
    }
    policies = {k: by for k, by in records.items() if k != BEFORE}
    against = compare(policies, NAMES, baseline=OURS).get("minus_baseline", {})
    return {**compare(records, NAMES, baseline=BEFORE), "reward": curves, "against": against}


def page(content: dict[str, Any], folder: Path) -> str:
    """Curves of the rewards, differences of the truth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.3 * max(1, len(content["reward"])), 2.5), layout="constrained")
    for axis, (label, runs) in zip(
        figure.subplots(1, max(1, len(content["reward"])), squeeze=False)[0], content["reward"].items(), strict=False
    ):
        array = np.array(list(runs.values()))
        axis.plot(array.T, color="tab:blue", alpha=0.25, linewidth=0.8)
        if (width := min(6, array.shape[1] // 2)) > 1:
            smooth = np.convolve(array.mean(0), np.ones(width) / width, mode="valid")
            axis.plot(np.arange(len(smooth)) + (width - 1) / 2, smooth, color="tab:blue", linewidth=2)
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("iteration", fontsize=8)
    save_plot(figure, folder / "reward_hacking_curves.png")
    picture = ""
    if content.get("minus_baseline"):
        forest(content["minus_baseline"], NAMES[:4], folder / "reward_hacking.png", content["by_seed"])
        picture = "![what each policy changed in the pictures](reward_hacking.png)\n\nBars: 95 % intervals over cases; dots: single seeds."
    rows = [[k, *(cell(m.get(n), "+.3f") for n in NAMES)] for k, m in content["against"].items()]
    return f"""Every policy maximises its own reward, and identity alone: Hungarian (one face a reference; with a penalty for faces nobody asked for, for faces that are like the other reference too, or for faces that repeat their reference's pose, crop and light), UMO's confidence, the best face of each reference (one face may serve
both), the mean over all pairs. A hack is a reward that rises while the attributes of the people, which no reward sees, or the number of people get worse.

![reward by iteration: thin lines are seeds, thick ones their mean over six iterations](reward_hacking_curves.png)

{picture}

{tables(content, NAMES, baseline=BEFORE)}

Against the {OURS} policy, which differs in nothing but the reward, case by case:

{markdown_table([f"- {OURS}", *NAMES], rows)}"""


STUDY = Study(
    name="reward_hacking", title="Which identity reward is gamed?", arms=arms, summarise=summarise, page=page, seeds=3
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
