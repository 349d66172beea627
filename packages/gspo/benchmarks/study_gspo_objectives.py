"""Every objective in worlds whose optimum is known, at equal function evaluations, each tuned on the same budget.

    nice -n 15 python packages/gspo/benchmarks/study_gspo_objectives.py --out benchmarks/results/gspo_objectives.json
    python packages/gspo/benchmarks/study_gspo_objectives.py --page benchmarks/results/gspo_objectives.json

A study that is interrupted goes on where it stopped. The page is docs/results/objectives.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from gspo.examples.closed_form import GROUPS, MEMBERS, METHODS, NUM_STEPS, TASKS, Setting, train

sys.path.insert(0, str(Path(__file__).parent))
from gspo_circumstances import circumstances

LEARNING_RATES = (0.01, 0.03, 0.1)
CHOICES: dict[str, list[dict[str, object]]] = {
    "gspo": [{"own_starts": False}, {"own_starts": True}],
    "grpo": [{"own_starts": False}, {"own_starts": True}],
    "guarded": [{"own_starts": False}, {"own_starts": True}],
    "dppo": [{"own_starts": False}, {"own_starts": True}],
    "nft": [{"weighting": "none"}, {"weighting": "self_normalized"}],
    "awm": [{"weighting": "none"}, {"weighting": "sigma"}],
    "refl": [{"refl_from": 0.0}, {"refl_from": 0.5}],
    "draft": [{"last_steps": 1}, {"last_steps": NUM_STEPS}],
}
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
BUDGET = 300_000


def settings(method: str) -> list[Setting]:
    """The grid of one method: three learning rates times two settings of its own."""
    return [Setting(method=method, lr=lr, **choice) for choice in CHOICES[method] for lr in LEARNING_RATES]  # type: ignore[arg-type]


def record(task_name: str, setting: Setting, seed: int, budget: int) -> dict:
    """One run, as it is written down: the curve thinned to some sixty places."""
    task = TASKS[task_name]()
    run = train(task, setting, budget=budget, seed=seed)
    every = max(1, len(run.regrets) // 60)
    tail = max(1, len(run.regrets) // 10)
    return {
        "task": task_name, "setting": asdict(setting), "seed": seed, "budget": budget,
        "evaluations": run.evaluations[::every], "regrets": run.regrets[::every],
        "last_regret": run.regrets[-1], "score": statistics.fmean(run.regrets[-tail:]),
        "first_regret": run.regrets[0], "iterations": len(run.regrets) - 1, "seconds": run.seconds,
        "error": (run.policy.coordinates() - task.optimum.coordinates()).tolist(),
        "to_tenth": next((e for e, r in zip(run.evaluations, run.regrets, strict=True) if r <= 0.1 * run.regrets[0]), None),
        "to_hundredth": next(
            (e for e, r in zip(run.evaluations, run.regrets, strict=True) if r <= 0.01 * run.regrets[0]), None
        ),
    }  # fmt: skip


def key(task: str, setting: dict, seed: int, budget: int) -> str:
    """What decides a run."""
    return json.dumps([task, setting, seed, budget], sort_keys=True)


def measure(out: Path, budget: int, seeds: tuple[int, ...]) -> None:
    """Tunes every method, then runs its best setting on five other seeds; writes after every run."""
    runs: dict[str, dict] = {}
    if out.exists():
        runs = {key(r["task"], r["setting"], r["seed"], r["budget"]): r for r in json.loads(out.read_text())["runs"]}

    def get(task: str, setting: Setting, seed: int) -> dict:
        name = key(task, asdict(setting), seed, budget)
        if name not in runs:
            runs[name] = record(task, setting, seed, budget)
            temporary = out.with_suffix(".tmp")
            temporary.write_text(json.dumps({"circumstances": circumstances(), "runs": list(runs.values())}))
            os.replace(temporary, out)
            print(
                f"{task} {setting.method} lr {setting.lr:g} seed {seed}: {runs[name]['score']:.2e}, "
                f"{runs[name]['seconds']:.1f} s of processor time",
                flush=True,
            )
        return runs[name]

    for task in TASKS:
        for method in METHODS:
            tried = [(get(task, setting, TUNING_SEED)["score"], setting) for setting in settings(method)]
            best = min(tried, key=lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf)[1]
            for seed in seeds:
                get(task, best, seed)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="runs are added to this file")
    parser.add_argument("--page", type=Path, help="write the page from this file")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"function evaluations of a run (default {BUDGET})")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of the comparison")
    options = parser.parse_args()
    if options.out is None and options.page is None:
        parser.error("give --out to measure or --page to write the page")
    torch.set_num_threads(1)
    if options.out:
        measure(options.out, options.budget, tuple(range(options.seeds)))
    if options.page:
        from gspo_objectives_page import write

        write(options.page, groups=GROUPS, members=MEMBERS)


if __name__ == "__main__":
    main()
