"""``make demo``: both stages from the shipped base, evaluation on the same seeds, figures and a report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from multicrafter import UserError
from multicrafter.config.recipes import ablation, tiny_align
from multicrafter.demo import figures
from multicrafter.demo.report import write_report
from multicrafter.files import write_json
from multicrafter.models.adapters import Adapters
from multicrafter.models.checks import check_finite
from multicrafter.models.loaded import LoadedModel
from multicrafter.models.loading import load_model
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import (
    METRICS,
    EvaluateConfig,
    WorldJudges,
    cases,
    difference,
    evaluate,
    summarise,
    table,
)
from multicrafter.scoring.watcher import drawn_watcher
from multicrafter.training.runs import run_align, run_pretrain
from multicrafter.training.scenes import encode_scenes
from multicrafter.world import judges
from multicrafter.world.rewards import RewardConfig, tiny_reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How much the demo does.

    Attributes:
        stage1_steps: Steps of the baseline and of stage 1.
        stage2_steps: Iterations of stage 2.
        scenes: Training scenes.
        cases: Evaluation cases.
        seed: Of everything.
    """

    stage1_steps: int = 320
    stage2_steps: int = 12
    scenes: int = 2500
    cases: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("stage1_steps", "stage2_steps", "scenes", "cases"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


class Clock:
    """Seconds spent by name."""

    def __init__(self) -> None:
        """Starts counting the total."""
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the block's time to ``name``."""
        logger.info(f"==> {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)

    def total(self) -> dict[str, float]:
        """Everything so far."""
        return {**self.seconds, "total": round(time.monotonic() - self.started, 1)}


def claims(
    differences: dict[str, dict[str, Any]], summary: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """What this run shows; an interval that includes 0 shows nothing.

    Args:
        differences: Stage 1 against the baseline, stage 2 against stage 1.
        summary: Of every model, for what is claimed of one model alone.
    """
    stage1, stage2 = differences["stage 1 - baseline"], differences["stage 2 - stage 1"]
    alone = {}
    if summary is not None:
        alone = {
            "Plain LoRA swaps attributes between people more often than chance would": {
                "holds": summary["baseline"]["swaps_above_chance"].low > 0
            },
            "The method swaps no more than .05 above chance": {
                "holds": summary["stage 1"]["swaps_above_chance"].high < 0.05
            },
        }
    return {
        **alone,
        "The method swaps fewer attributes than plain LoRA": {"holds": stage1["swaps"].high < 0},
        "The method shows more of the right attributes than plain LoRA": {"holds": stage1["attributes"].low > 0},
        "The method shows people more like their references than plain LoRA (identity)": {
            "holds": stage1["identity"].low > 0
        },
        "Stage 2 raises its composite reward on unseen prompts": {"holds": stage2["reward"].low > 0},
        "Stage 2 does not lower identity": {"holds": stage2["identity"].high >= 0},
    }


def run(
    out: Path, config: DemoConfig, *, model: str | None = None, resume: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """The whole demo into ``out``, computed on ``device``; returns what it writes to results.json."""
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    recipes = ablation(seed=config.seed)
    stage1 = {
        name: replace(recipes[row].pretrain, num_steps=config.stage1_steps, num_scenes=config.scenes, seed=config.seed)
        for name, row in (("baseline", "baseline"), ("stage 1", "full"))
    }
    stage2 = replace(tiny_align(seed=config.seed), num_steps=config.stage2_steps)
    evaluation = replace(recipes["full"].evaluate, num_cases=config.cases)
    everyone = WorldJudges.load()
    reward = tiny_reward(RewardConfig())

    def score(base: LoadedModel, evaluation: EvaluateConfig) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        metrics, pictures = evaluate(base, unseen, everyone, evaluation)
        metrics["swaps_above_chance"] = metrics["swaps"] - metrics["swaps_by_chance"]
        metrics["reward"] = reward(list(pictures), unseen.captions, unseen.subject_pictures()).totals
        return metrics, pictures, figures.subject_maps(base, unseen, shown, blocks=lambda _: True)

    with clock.measure("draw scenes"):
        base = load_model(model).to(device)
        first = stage1["baseline"]
        training = encode_scenes(base, first.world, first.num_scenes, seed=first.data_seed)
        unseen = cases(base, evaluation)
    shown = list(range(min(5, config.cases)))
    metrics, pictures, maps, histories = {}, {}, {}, {}
    for name, folder in (("baseline", "baseline"), ("stage 1", "stage1")):
        base = load_model(model).to(device)
        with clock.measure(f"train {name}"):
            run_pretrain(base, stage1[name], out / folder, scenes=training, resume=resume)
        with clock.measure(f"evaluate {name}"):
            bound = evaluation if stage1[name].separation is not None else replace(evaluation, separation=None)
            metrics[name], pictures[name], maps[name] = score(base, bound)
        histories[name] = [json.loads(line) for line in (out / folder / "metrics.jsonl").read_text().splitlines()]
    loaded = MultiCrafterPipeline.from_pretrained(model, adapter=out / "stage1" / "adapter", device=device)
    assert isinstance(loaded.adapters, Adapters)
    with clock.measure("train stage 2"):
        history = run_align(
            loaded.model, loaded.adapters, stage2, out / "stage2", resume=resume, watcher=drawn_watcher(), sampling=loaded.sampling
        )  # fmt: skip
    with clock.measure("evaluate stage 2"):
        metrics["stage 2"], pictures["stage 2"], maps["stage 2"] = score(loaded.model, evaluation)
    differences = {
        f"{a} - {b}": difference(metrics[a], metrics[b]) for a, b in (("stage 1", "baseline"), ("stage 2", "stage 1"))
    }
    with clock.measure("draw figures"):
        figures.side_by_side(out / "side_by_side.png", unseen, pictures["baseline"], pictures["stage 1"], shown[:4])
        figures.picture_grid(out / "pictures.png", unseen, pictures, shown)
        figures.attention_figure(out / "attention.png", unseen, maps, shown)
        figures.training_curve(out / "training.png", histories)
        figures.reward_curve(out / "reward.png", history)
    summary = {name: summarise(m) for name, m in metrics.items()}
    results = {
        "summary": summary,
        "differences": differences,
        "claims": claims(differences, summary),
        "metrics": {
            **METRICS,
            "swaps_above_chance": "swaps minus swaps_by_chance, case by case",
            "reward": "weighted sum of text, aesthetics and Multi-ID, what stage 2 is trained on",
        },
        "judges": judges.accuracy(),
        "seconds": clock.total(),
        "config": {
            **asdict(config),
            "stage1": asdict(stage1["stage 1"]),
            "stage2": asdict(stage2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    write_json(out / "results.json", results)
    page = write_report(out)
    print(table(summary))
    for text, claim in claims(differences, summary).items():
        print(f"{'holds    ' if claim['holds'] else 'not shown'}  {text}")
    for label, path in (
        ("without and with the method", "side_by_side.png"),
        ("pictures", "pictures.png"),
        ("attention maps", "attention.png"),
        ("reward curve", "reward.png"),
        ("numbers", "results.json"),
    ):
        print(f"{label}: {out / path}")
    print(f"report: {page}")
    return results
