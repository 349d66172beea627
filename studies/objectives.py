"""Which objective of policy optimization comes how far at equal function evaluations, where the optimum is known on paper and where it is not?

    python -m studies.objectives run     # some minutes of one core; goes on where it was interrupted
    python -m studies.objectives page    # docs/results/objectives.md

Two worlds (`gspo.examples.closed_form`): a Gaussian, and a mixture in the plane. Every method is tuned with the same budget on seeds that the
tables do not show. Results: benchmarks/results/objectives.parquet.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from gspo.examples.closed_form import METHODS, NUM_STEPS, TASKS, Setting, train

from benchmarks.run import ROOT
from studies import objectives_flux, objectives_page, objectives_world, objectives_world_page
from studies.lab.measurements import add, read_runs

OUT = ROOT / "benchmarks" / "results" / "objectives.parquet"

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
TUNING_SEED, SEEDS = objectives_page.TUNING_SEED, (0, 1, 2, 3, 4)
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
        "evaluations": run.evaluations[::every], "regrets": [float(f"{r:.5g}") for r in run.regrets[::every]],
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
    runs = read_runs(out)

    def get(task: str, setting: Setting, seed: int, budget: int = budget) -> dict:
        name = key(task, asdict(setting), seed, budget)
        if name not in runs:
            runs[name] = record(task, setting, seed, budget)
            add(out, name, runs[name])
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
            found = [get(task, best, seed) for seed in seeds]
            if objectives_page.distance(found).deviation > objectives_page.OFF:  # is it off, or has it not arrived?
                for seed in seeds:
                    get(task, best, seed, objectives_page.LONGER * budget)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.objectives", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument(
        "--out", type=Path, default=OUT, help="runs are added to this file, and the page is made from it"
    )
    parser.add_argument(
        "--flux",
        type=Path,
        default=objectives_flux.OUT,
        help="what `studies.objectives_flux` has recorded, if anything",
    )
    parser.add_argument(
        "--world", type=Path, default=objectives_world.OUT, help="the same of `studies.objectives_world`"
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "results", help="folder of the page")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"function evaluations of a run (default {BUDGET})")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of the comparison")
    options = parser.parse_args(arguments)
    for name, least in (("budget", 1), ("seeds", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.what == "page" and not options.out.is_file():
        parser.error(f"--out must be a file that `run` has written, got {options.out}")
    torch.set_num_threads(1)
    if options.what == "run":
        measure(options.out, options.budget, tuple(range(options.seeds)))
    else:
        options.docs.mkdir(parents=True, exist_ok=True)
        also = objectives_flux.section(options.flux, options.docs) if options.flux.is_file() else ""
        if options.world.is_file():
            also += objectives_world_page.section(options.world, options.docs)
        objectives_page.write(options.out, options.docs, also)
    return 0


if __name__ == "__main__":
    sys.exit(main())
