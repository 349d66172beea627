"""What the second-order tail costs in accuracy: final latents, pictures and the ranking of rewards on the tiny FLUX.

python packages/gspo/benchmarks/study_gspo_tail.py --out benchmarks/results/gspo_tail.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from gspo import FlowSDE, rollout
from gspo.examples.flux_jpeg import PROMPTS, kilobytes, load
from gspo.integrations.diffusers import PipelinePolicy

sys.path.insert(0, str(Path(__file__).parent))
from gspo_circumstances import circumstances, trained_flux

STEPS, GROUP = 16, 12


def spearman(one: torch.Tensor, two: torch.Tensor) -> float:
    """Rank correlation."""
    ranks = [t.argsort().argsort().double() for t in (one, two)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fine", type=int, default=60, help="steps of the solution taken as exact")
    options = parser.parse_args()
    actor = PipelinePolicy(load(trained_flux()), PROMPTS, height=64, width=64)
    sigmas, noise = actor.sigmas(STEPS), actor.noise(torch.Generator().manual_seed(0))
    rows = []
    for start in (0, 5, 10):
        left = STEPS - start - 2
        results = {}
        for name, tail in (("exact", options.fine), ("euler", None), ("tail", max(1, round(0.4 * left)))):
            drawn = rollout(
                actor, noise, sigmas, kernel=FlowSDE(), window=(start, start + 1), group_size=GROUP,
                generator=torch.Generator().manual_seed(1), tail_steps=tail,
            )  # fmt: skip
            pictures = actor.decode(drawn.latents, drawn.index, output_type="pt")
            sizes = torch.tensor(kilobytes(actor.decode(drawn.latents, drawn.index)))
            results[name] = (drawn.latents, pictures, sizes)

        def compare(one: str, two: str, results=results) -> dict[str, float]:
            a, b = results[one], results[two]
            ranks = [spearman(a[2][i : i + GROUP], b[2][i : i + GROUP]) for i in range(0, len(a[2]), GROUP)]
            error = float((a[0] - b[0]).square().mean().sqrt() / b[0].std())
            return {
                "latents": error, "pictures": float((a[1] - b[1]).square().mean().sqrt()),
                "rank_correlation": sum(ranks) / len(ranks),
            }  # fmt: skip

        rows.append({
            "window_start": start, "euler_steps": left, "tail_steps": max(1, round(0.4 * left)),
            "euler_to_exact": compare("euler", "exact"), "tail_to_exact": compare("tail", "exact"),
            "tail_to_euler": compare("tail", "euler"),
        })  # fmt: skip
        print(rows[-1], flush=True)
        options.out.write_text(json.dumps({"circumstances": circumstances(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
