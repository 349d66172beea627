"""Four ratios on a policy with top-1 expert routing: who learns, who spreads, who collapses.

    python packages/gspo/benchmarks/study_gspo_moe.py --out benchmarks/results/gspo_moe_stability.json

A rollout's latents are stored, so an update that moves the router sends some of them to another expert: their velocity jumps. Step
ratios see that jump whole, the sequence ratio sees its mean over the window, replay forbids it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from gspo import FlowSDE, OnlineConfig, OnlineTrainer, PolicyConfig, SlidingWindow
from gspo.plot import pyplot
from gspo.reference import gaussian_velocity

sys.path.insert(0, str(Path(__file__).parent))
from gspo_circumstances import circumstances

VARIANTS = {
    "step": ("step", False),
    "step + replay": ("step", True),
    "guarded": ("guarded", False),
    "GSPO": ("sequence", False),
}
DIM, PROMPTS, EXPERTS, STEPS = 16, 6, 4, 8


class MoEPolicy(torch.nn.Module):
    """``velocity = exact flow to N(0, 0.5^2) + kept probability * chosen expert(x, sigma, prompt)``."""

    def __init__(self, generator: torch.Generator, width: int = 32) -> None:
        super().__init__()
        inputs = DIM + 1 + PROMPTS

        def draw(*shape: int, scale: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        self.gate = draw(inputs, EXPERTS, scale=inputs**-0.5)
        self.first = draw(EXPERTS, inputs, width, scale=inputs**-0.5)
        self.second = draw(EXPERTS, width, DIM, scale=0.3 * width**-0.5)
        self.forced = self.chosen = None

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([x, sigma[:, None], torch.nn.functional.one_hot(index, PROMPTS).to(x)], 1)
        probability = (inputs @ self.gate).softmax(1)
        self.chosen = probability.argmax(1) if self.forced is None else self.forced
        # all experts, then the chosen one: cheaper on a CPU than gathering weights
        hidden = torch.nn.functional.silu(torch.einsum("bi,eiw->ebw", inputs, self.first))
        out = torch.einsum("ebw,ewd->ebd", hidden, self.second)
        rows = torch.arange(len(x))
        return gaussian_velocity(x, sigma, 0.0, 0.5) + probability[rows, self.chosen, None] * out[self.chosen, rows]


def run(variant: str, lr: float, seed: int, iterations: int) -> dict[str, object]:
    """One training: mean reward, spread of the ratio and share of re-routed latents per iteration."""
    ratio, replayed = VARIANTS[variant]
    generator = torch.Generator().manual_seed(seed)
    model, targets = MoEPolicy(generator), torch.randn(PROMPTS, DIM, generator=generator)
    kept: dict[int, torch.Tensor] = {}
    moved: list[float] = []

    @contextmanager
    def record(position: int, rows: torch.Tensor):
        yield
        kept[position] = model.chosen

    @contextmanager
    def watch(position: int, rows: torch.Tensor):
        if replayed:
            model.forced = kept[position][rows]
        yield
        moved.append(float((model.chosen != kept[position][rows]).float().mean()))
        model.forced = None

    config = OnlineConfig(
        window=SlidingWindow(STEPS, size=2, interval=4), kernel=FlowSDE(), group_size=8, seed=seed,
        policy=PolicyConfig(ratio=ratio, num_inner_epochs=4),
    )  # fmt: skip
    trainer = OnlineTrainer(list(model.parameters()), torch.optim.Adam(model.parameters(), lr=lr), config)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    curve: dict[str, list[float]] = {"reward": [], "ratio_std": [], "rerouted": [], "clip_fraction": []}
    for _ in range(iterations):
        moved.clear()
        noise = torch.randn(PROMPTS, DIM, generator=generator)
        try:
            report = trainer.step(
                model, noise, sigmas, lambda x, i: -(x - targets[i]).square().mean(1), record=record, replay=watch
            )
        except ValueError:  # a velocity that is no longer finite
            break
        summary = report.summary()
        for name in ("reward", "ratio_std", "clip_fraction"):
            curve[name].append(summary[name])
        curve["rerouted"].append(statistics.fmean(moved) if moved else 0.0)
    rewards = curve["reward"] + [float("-inf")] * (iterations - len(curve["reward"]))
    last, best = statistics.fmean(rewards[-10:]), max(rewards)
    # a run collapses if it ends, over its last 10 iterations, below the reward it started from
    return {
        "variant": variant,
        "lr": lr,
        "seed": seed,
        "final": last,
        "best": best,
        "collapsed": not last > rewards[0],
        **curve,
    }


def summarise(runs: list[dict]) -> list[dict]:
    """Per variant and learning rate: mean and spread over seeds, collapses."""
    rows = []
    for lr in sorted({r["lr"] for r in runs}):
        for variant in VARIANTS:
            mine = [r for r in runs if r["lr"] == lr and r["variant"] == variant]
            finals = [r["final"] for r in mine]
            rows.append({
                "lr": lr, "variant": variant, "seeds": len(mine), "final": statistics.fmean(finals),
                "spread": statistics.stdev(finals) if len(finals) > 1 else 0.0,
                "collapsed": sum(r["collapsed"] for r in mine),
                "ratio_std": statistics.median(v for r in mine for v in r["ratio_std"]),
                "clip_fraction": statistics.median(v for r in mine for v in r["clip_fraction"]),
                "rerouted": statistics.fmean(v for r in mine for v in r["rerouted"]),
            })  # fmt: skip
    return rows


def plot(runs: list[dict], path: Path) -> None:
    """Reward curves, one panel per learning rate; thin lines are seeds."""
    plt = pyplot()
    rates = sorted({r["lr"] for r in runs})
    figure, axes = plt.subplots(
        1, len(rates), figsize=(4.4 * len(rates), 3.6), constrained_layout=True, sharey=True, squeeze=False
    )
    for axis, lr in zip(axes[0], rates, strict=True):
        for variant, color in zip(VARIANTS, ("tab:red", "tab:orange", "tab:green", "tab:blue"), strict=True):
            curves = [r["reward"] for r in runs if r["lr"] == lr and r["variant"] == variant]
            for curve in curves:
                axis.plot(curve, color=color, alpha=0.25, linewidth=0.8)
            length = min(map(len, curves))
            axis.plot([statistics.fmean(c[i] for c in curves) for i in range(length)], color=color, label=variant)
        axis.set(title=f"Adam, lr {lr:g}", xlabel="iteration", ylim=(-3, 0))
    axes[0, 0].set_ylabel("mean reward of the rollouts")
    axes[0, -1].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; a picture goes beside it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--append", action="store_true", help="keep the runs that the JSON already has")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    options = parser.parse_args()
    runs = json.loads(options.out.read_text())["runs"] if options.append and options.out.exists() else []
    jobs = [(v, lr, s) for lr in options.lr for v in VARIANTS for s in range(options.seeds)]
    for number, (variant, lr, seed) in enumerate(jobs):
        runs.append(run(variant, lr, seed, options.iterations))
        print(
            f"\r{number + 1}/{len(jobs)} {variant} lr {lr:g} final {runs[-1]['final']:.3f}   ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    rows = summarise(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rounded = [{k: [round(x, 6) for x in v] if isinstance(v, list) else v for k, v in r.items()} for r in runs]
    options.out.write_text(json.dumps({"circumstances": circumstances(), "summary": rows, "runs": rounded}))
    plot(runs, options.out.with_suffix(".png"))
    print()
    for row in rows:
        print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
