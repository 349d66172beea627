"""How many function evaluations does a tiny FLUX need, with each objective, until its pictures are redder?

    python -m studies.objectives_flux    # some minutes of one core; goes on where it was interrupted

The base is `gspo.examples.tiny_flux`, taught to paint stripes of any colour; all its weights are trained. The reward is how much redder than
green and blue a picture is on average. Results: benchmarks/results/objectives_flux.parquet, shown by `studies.objectives`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gspo import draw
from gspo.examples.closed_form import NUM_STEPS, Setting, Task, train
from gspo.examples.tiny_flux import teach, tiny_flux
from gspo.plot import pyplot
from torch import Tensor

from benchmarks.run import ROOT
from studies import objectives_page
from studies.lab.measurements import add, read_runs

OUT = ROOT / "benchmarks" / "results" / "objectives_flux.parquet"
SETTINGS: dict[str, dict[str, Any]] = {
    "gspo": {},
    "grpo": {},
    "guarded": {},
    "dppo": {},
    "nft": {"weighting": "self_normalized"},
    "awm": {},
    "refl": {},
    "draft": {},
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
BUDGET, BATCH, SIDE = 12_000, (4, 8), 8
EVERY, CASES = 2, 64
"""The mean reward is measured on 64 fixed starts, after every second iteration."""


class FluxPolicy(torch.nn.Module):
    """A FLUX without prompts; latents are packed, (b, 64, 16)."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.transformer, self.vae, self.shape = pipe.transformer, pipe.vae, (SIDE * SIDE, 16)
        rows, columns = torch.arange(SIDE).repeat_interleave(SIDE), torch.arange(SIDE).repeat(SIDE)
        self.places = torch.stack([torch.zeros(SIDE * SIDE), rows, columns], 1)
        self.vae.requires_grad_(False)

    def trained(self) -> list[torch.nn.Parameter]:
        """All weights of the transformer."""
        return list(self.transformer.parameters())

    def forward(self, latents: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        """Velocity."""
        text, pooled = torch.zeros(len(latents), 8, 32), torch.zeros(len(latents), 32)
        return self.transformer(latents, text, pooled, sigma, self.places, torch.zeros(8, 3), return_dict=False)[0]

    def redness(self, latents: Tensor) -> Tensor:
        """Mean of red minus mean of green and blue, (b,), of pictures in [-1, 1]."""
        parts = latents.reshape(-1, SIDE, SIDE, 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        pictures = self.vae.decode(parts.reshape(-1, 4, 2 * SIDE, 2 * SIDE) / 0.3, return_dict=False)[0].clamp(-1, 1)
        return (pictures[:, 0] - pictures[:, 1:].mean(1)).mean((1, 2))


@cache
def base(teaching_steps: int = 400) -> FluxPolicy:
    """The policy that every run begins with."""
    pipe = tiny_flux(["a"])
    teach(pipe, side=SIDE, steps=teaching_steps)
    return FluxPolicy(pipe)


@torch.no_grad()
def rewards(policy: FluxPolicy) -> Tensor:
    """Of pictures of the fixed starts."""
    noise = torch.randn(CASES, *policy.shape, generator=torch.Generator().manual_seed(12345))
    return policy.redness(draw(policy, noise, torch.linspace(1, 0, NUM_STEPS + 1)).latents)


class Curve:
    """Level minus mean reward, measured at every second call."""

    def __init__(self, level: float) -> None:
        self.level, self.calls, self.last = level, 0, 0.0

    def __call__(self, policy: Any) -> float:
        """The newest measurement."""
        if self.calls % EVERY == 0:
            self.last = self.level - float(rewards(policy).mean())
        self.calls += 1
        return self.last


def record(setting: Setting, seed: int, budget: int, teaching_steps: int) -> dict:
    """One run. The level is the mean reward of the base and four standard deviations, which hardly a picture of the base reaches."""
    start = base(teaching_steps)
    known = rewards(start)
    level = float(known.mean() + 4 * known.std())
    task: Any = Task(
        "flux", lambda: copy.deepcopy(start), None, lambda policy, x: policy.redness(x), Curve(level), BATCH
    )  # type: ignore[arg-type,return-value,attr-defined]
    run = train(task, setting, budget=budget, seed=seed)
    found = [level - r for r in run.regrets]
    return {
        "setting": asdict(setting), "seed": seed, "budget": budget, "level": level, "evaluations": run.evaluations[::EVERY],
        "rewards": [float(f"{r:.5g}") for r in found[::EVERY]], "seconds": run.seconds,
        "to_level": next((e for e, r in zip(run.evaluations, found, strict=True) if r >= level), None),
    }  # fmt: skip


def cost(found: Sequence[dict]) -> float:
    """What tuning compares: evaluations to the level, or how far a run that does not reach it stays below."""
    return statistics.fmean(
        r["to_level"] if r["to_level"] is not None else r["budget"] * (2 + r["level"] - r["rewards"][-1]) for r in found
    )


def measure(out: Path, budget: int, teaching_steps: int) -> None:
    """Tunes the learning rate on one seed, then runs the best on others; writes after every run."""
    runs = read_runs(out)

    def get(setting: Setting, seed: int) -> dict:
        name = json.dumps([asdict(setting), seed, budget], sort_keys=True)
        if name not in runs:
            runs[name] = record(setting, seed, budget, teaching_steps)
            add(out, name, runs[name])
            last = runs[name]
            print(
                f"{setting.method} lr {setting.lr:g} seed {seed}: level after {last['to_level']}, {last['rewards'][-1]:.3f} at last, "
                f"{last['seconds']:.0f} s of processor time",
                flush=True,
            )
        return runs[name]

    for method, knobs in SETTINGS.items():
        tried = [Setting(method=method, lr=lr, **knobs) for lr in LEARNING_RATES]
        best = min(tried, key=lambda setting: cost([get(setting, TUNING_SEED)]))
        for seed in SEEDS:
            get(best, seed)


def chosen(runs: list[dict], method: str) -> tuple[dict, list[dict]]:
    """The run that tuning chose, and those of its setting on the other seeds."""
    mine = [r for r in runs if r["setting"]["method"] == method]
    best = min((r for r in mine if r["seed"] == TUNING_SEED), key=lambda r: cost([r]))
    return best, [r for r in mine if r["setting"] == best["setting"] and r["seed"] != TUNING_SEED]


def middle(found: list[dict]) -> float | None:
    """Mean evaluations to the level; None where a run does not reach it."""
    reached = [r["to_level"] for r in found]
    return None if None in reached else statistics.fmean(reached)


def seconds_to_level(found: list[dict]) -> str:
    """Mean processor seconds until the level, at the mean pace of each run."""
    reached = [r["seconds"] * r["to_level"] / r["evaluations"][-1] for r in found if r["to_level"] is not None]
    return f"{statistics.fmean(reached):.1f}" if len(reached) == len(found) else "not reached"


def fell_back(r: dict) -> bool:
    """Whether a run was at the level and later below it."""
    if r["to_level"] is None:
        return False
    return any(
        reward < r["level"] for e, reward in zip(r["evaluations"], r["rewards"], strict=True) if e > r["to_level"]
    )


def section(source: Path, docs: Path) -> str:
    """Its part of the page, and the plot."""
    runs, names = list(read_runs(source).values()), objectives_page.NAMES
    methods = [
        m for m in SETTINGS if any(r["setting"]["method"] == m for r in runs) and len(chosen(runs, m)[1]) == len(SEEDS)
    ]
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(6.5, 3.8), constrained_layout=True)
    ax.axhline(runs[0]["level"], color="0.5", linestyle=":", label="level")
    lines, cells = [], {}
    for method in methods:
        best, found = chosen(runs, method)
        length, color = min(len(r["rewards"]) for r in found), objectives_page.COLORS[method]
        x, columns = (
            [e / 1000 for e in found[0]["evaluations"][:length]],
            list(zip(*(r["rewards"][:length] for r in found), strict=True)),
        )
        ax.plot(x, [statistics.median(c) for c in columns], color=color, linewidth=1.6, label=names[method])
        ax.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.12, linewidth=0)
        cells[method] = middle(found)
        rates = {
            r["setting"]["lr"]: r["to_level"]
            for r in runs
            if r["setting"]["method"] == method and r["seed"] == TUNING_SEED
        }
        each = ", ".join("not reached" if r["to_level"] is None else f"{r['to_level']:,}" for r in found)
        tuned = ", ".join(f"{lr:g}: {'not reached' if n is None else f'{n:,}'}" for lr, n in sorted(rates.items()))
        lines.append(
            f"| {names[method]} | {best['setting']['lr']:g} | {each} | {seconds_to_level(found)} "
            f"| {statistics.fmean(r['rewards'][-1] for r in found):.2f} | {statistics.fmean(r['seconds'] for r in found):.0f} | {tuned} |"
        )
    ax.set(xlabel="thousand function evaluations", ylabel="mean redness of 64 fixed starts")
    ax.legend(fontsize=8, loc="lower right")
    ax.grid(alpha=0.3)
    figure.savefig(docs / "objectives_flux.png", dpi=110)
    plt.close(figure)
    known = {m: n for m, n in cells.items() if n is not None}
    told = ""
    if "gspo" in known:
        parts = [f"{names[m]} {known['gspo'] / n:.1f}" for m, n in known.items() if m != "gspo"]
        third = [names[m] for m, n in known.items() if 3 * n <= known["gspo"]]
        told = f"Times fewer function evaluations than GSPO: {', '.join(parts)}. " + (
            f"A third of GSPO's suffice for {', '.join(third)}." if third else "None needs as few as a third of GSPO's."
        )
    shown = {names[m]: chosen(runs, m)[1] for m in methods}
    at_once = [name for name, found in shown.items() if all(r["to_level"] == r["evaluations"][1] for r in found)]
    if at_once:
        told += f" At the first measurement already: {', '.join(at_once)}, whose factors are therefore at least these."
    missed = {name: sum(r["to_level"] is None for r in found) for name, found in shown.items()}
    short = [f"{count} of {len(SEEDS)} runs of {name}" for name, count in missed.items() if count]
    if short:
        told += f" Never at the level: {', '.join(short)}, hence no factor."
    back = [name for name, found in shown.items() if any(fell_back(r) for r in found)]
    if back:
        told += f" Some run of {', '.join(back)} fell below the level again."
    table = "\n".join(lines)
    return f"""
## A tiny FLUX, and redder pictures

No optimum is known here; the question is how fast a real architecture learns something that every method can learn. The base is a FLUX of some hundred thousand weights that was taught to paint stripes of any colour (`gspo.examples.tiny_flux`), all of which are trained. The reward is how much redder a picture is than green and blue.
The level is the mean reward of the base and four of its standard deviations, {runs[0]["level"]:.2f}.

![Mean redness over function evaluations](objectives_flux.png)

{told} Evaluations are counted as above, so DRaFT-K's passes through the decoder and backwards come on top.

| method | learning rate | evaluations to the level, by seed | seconds to the level | redness at the end | seconds in all | tuning seed: evaluations to the level by rate |
| --- | --- | --- | --- | --- | --- | --- |
{table}

An iteration draws {BATCH[0]} groups of {BATCH[1]} samples in {NUM_STEPS} steps; a run has {runs[0]["budget"]:,} evaluations. The reward is measured every second iteration, which is as fine as the counts are. Learning rates were tuned on one seed over the same three values for every method, and {len(SEEDS)} other seeds are shown; the plot has their median and range. Factors are of the means over the seeds. Seconds are of one processor, training only.

{objectives_page.origin(runs[0], "studies.objectives_flux")}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.objectives_flux", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=OUT, help="runs are added to this file")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"function evaluations of a run (default {BUDGET})")
    parser.add_argument("--teaching-steps", type=int, default=400, help="of the base")
    options = parser.parse_args(arguments)
    for name in ("budget", "teaching_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(1)
    measure(options.out, options.budget, options.teaching_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
