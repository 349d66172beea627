"""Did stage 2 pay? The stage-1 adapter that ships, and what stage 2 has made of it, on the same cases.

    python -m studies.stage2 run ADAPTER [--split test]     # draws and scores both; some 12 minutes on one core
    python -m studies.stage2 page                           # docs/results/stage2.md

Criterion, written before the test split was drawn. Both adapters draw the same 512 test cases from the same noise, bound by a draft as they ship
(16 steps, guidance 3.5). The stage-2 adapter ships if the 95 % interval of the difference in the composite reward is above 0, and no interval of
text, aesthetics, attributes, count, setting, identity (by the judge that trained and by the one that did not) lies below 0, nor that of swaps
above. It becomes the default of ``generate`` only if the interval of attributes or of count is above 0 besides: that is what a viewer sees.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from multicrafter.files import write_json
from multicrafter.models.binding import BindingConfig, IdentityFinder
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import (
    EvaluateConfig,
    WorldJudges,
    cases,
    difference,
    draw_cases,
    score_pictures,
    summarise,
)
from multicrafter.world import shipped_adapter
from multicrafter.world.rewards import RewardConfig, drawn_watcher, tiny_reward

from benchmarks.run import circumstances

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "stage2.json"
BETTER = ("reward", "text", "aesthetics", "attributes", "count", "setting", "identity", "identity_watched")
WORSE = ("swaps",)
DRAWN = {"bound": BindingConfig(mode="draft"), "attention as it is": None}


def measured(folder: Path, config: EvaluateConfig) -> dict[str, dict[str, np.ndarray]]:
    """Metrics per case of one adapter, by how it is drawn."""
    pipeline = MultiCrafterPipeline.from_pretrained(adapter=folder)
    judges, reward, watcher = WorldJudges.load(), tiny_reward(RewardConfig()), drawn_watcher()
    scenes = cases(pipeline.model, config)
    references = [list(row) for row in scenes.reference_images]
    found = {}
    for name, separation in DRAWN.items():
        drawn = draw_cases(
            pipeline.model, scenes, replace(config, separation=separation), finder=IdentityFinder(backend=judges.people)
        )
        pictures = list(drawn.pictures)
        found[name] = {
            **score_pictures(drawn.pictures, scenes, judges),
            "reward": reward(pictures, scenes.captions, references).totals,
            "identity_watched": watcher(pictures, scenes.captions, references),
        }
    return found


def verdict(differences: dict[str, Any]) -> dict[str, bool]:
    """The criterion, of the differences (stage 2 minus stage 1) that were drawn bound."""
    worse = any(differences[n].high < 0 for n in BETTER) or any(differences[n].low > 0 for n in WORSE)
    ships = differences["reward"].low > 0 and not worse
    return {"ships": ships, "default": ships and max(differences[n].low for n in ("attributes", "count")) > 0}


def run(folder: Path, split: str, num_cases: int, out: Path | None) -> dict[str, Any]:
    """Both adapters on one split."""
    config = EvaluateConfig(split=split, num_cases=num_cases, num_sampling_steps=16, guidance=3.5)  # type: ignore[arg-type]
    clock = time.perf_counter()
    stage1, stage2 = (measured(f, config) for f in (shipped_adapter(), folder))
    content: dict[str, Any] = {"split": split, "cases": num_cases, "config": asdict(config), "adapter": folder.name}
    for name in DRAWN:
        differences = difference(stage2[name], stage1[name])
        content[name] = {
            "stage 1": {k: v._asdict() for k, v in summarise(stage1[name]).items()},
            "stage 2": {k: v._asdict() for k, v in summarise(stage2[name]).items()},
            "difference": {k: v._asdict() for k, v in differences.items()},
        }
        if name == "bound":
            content["verdict"] = verdict(differences)
    content |= {"seconds": time.perf_counter() - clock, **circumstances()}
    for name in DRAWN:
        print(f"== {name}")
        for metric in (*BETTER, *WORSE):
            a, b, d = (content[name][k][metric] for k in ("stage 1", "stage 2", "difference"))
            print(
                f"{metric:18s} {a['mean']:7.3f} -> {b['mean']:7.3f}   {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
            )
    print(content["verdict"])
    if out is not None:
        known = json.loads(out.read_text()) if out.exists() else {}
        write_json(out, {**known, split: content})
    return content


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.stage2", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("adapter", type=Path)
    one.add_argument("--split", choices=("validation", "test"), default="test")
    one.add_argument("--cases", type=int, default=512)
    one.add_argument("--dry", action="store_true", help="print only")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run(given.adapter, given.split, given.cases, None if given.dry else OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
