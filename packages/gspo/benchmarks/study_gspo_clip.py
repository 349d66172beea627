"""One setting of the clip range for several kernels: "auto", against the number that is right for FlowSDE.

python packages/gspo/benchmarks/study_gspo_clip.py --out benchmarks/results/gspo_clip.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from gspo import DanceSDE, FlowCPS, FlowSDE, PolicyConfig
from gspo.examples import flux_jpeg, pointmass

sys.path.insert(0, str(Path(__file__).parent))
from gspo_circumstances import circumstances, trained_flux

KERNELS = {
    "FlowSDE 0.7": FlowSDE(0.7),
    "FlowCPS 0.8": FlowCPS(0.8),
    "FlowCPS 0.1": FlowCPS(0.1),
    "DanceSDE 0.1": DanceSDE(0.1),
}


def describe(reports) -> dict[str, object]:
    """Clip range and fraction (last inner epoch), and the reward at both ends."""
    rewards = [r.summary()["reward"] for r in reports]
    third = max(1, len(rewards) // 3)
    by_start: dict[int, list[float]] = {}
    for r in reports:
        by_start.setdefault(r.window[0], []).append(r.update.clip_range)
    return {
        "clip_range": statistics.median(r.update.clip_range for r in reports),
        "clip_range_by_start": {start: statistics.median(v) for start, v in by_start.items()},
        "clip_fraction": statistics.fmean(float(r.update.surrogate.clip_fraction) for r in reports),
        "reward_first": statistics.fmean(rewards[:third]), "reward_last": statistics.fmean(rewards[-third:]),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=70, help="of the point mass")
    parser.add_argument("--flux-iterations", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: list[dict] = []

    def both(task: str, seed: int, run) -> None:
        fixed = None
        for setting in ("auto", "fixed"):
            for name, kernel in KERNELS.items():
                clip = "auto" if setting == "auto" else fixed
                row = {
                    "task": task,
                    "seed": seed,
                    "kernel": name,
                    "setting": setting,
                    **describe(run(kernel, clip, seed)),
                }
                if setting == "auto" and fixed is None:
                    fixed = row["clip_range"]  # FlowSDE's own
                rows.append(row)
                print({k: v for k, v in row.items() if k != "clip_range_by_start"}, flush=True)
                options.out.write_text(json.dumps({"circumstances": circumstances(), "rows": rows}, indent=1))

    for seed in range(options.seeds):
        both("point mass", seed, lambda kernel, clip, seed: pointmass.train(
            kernel=kernel, policy=PolicyConfig(clip_range=clip, num_inner_epochs=3), iterations=options.iterations, seed=seed
        ).reports)  # fmt: skip
    pipe = flux_jpeg.load(trained_flux())
    both("tiny FLUX, JPEG size", 0, lambda kernel, clip, seed: flux_jpeg.train(
        pipe, kernel=kernel, policy=PolicyConfig(clip_range=clip, num_inner_epochs=3), iterations=options.flux_iterations, seed=seed
    ).reports)  # fmt: skip


if __name__ == "__main__":
    main()
