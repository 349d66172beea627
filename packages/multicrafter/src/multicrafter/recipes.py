"""Named configurations: the rows of the ablation at the scale of the tiny world."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from multicrafter.adapters import AdapterConfig
from multicrafter.evaluate import EvaluateConfig
from multicrafter.stages.align import AlignConfig
from multicrafter.stages.pretrain import IDARConfig, PretrainConfig


class Recipe(NamedTuple):
    """Stage 1, stage 2 (None: left out), evaluation."""

    pretrain: PretrainConfig
    align: AlignConfig | None
    evaluate: EvaluateConfig


def tiny(*, seed: int = 0) -> Recipe:
    """Everything: attention supervision, mixture of LoRA experts, policy optimization."""
    return Recipe(PretrainConfig(seed=seed), AlignConfig(seed=seed), EvaluateConfig())


def ablation(*, seed: int = 0) -> dict[str, Recipe]:
    """The four rows of the paper's ablation, each adding one part, and the paper's letter of the attention loss.

    Same data, steps and seed; plain LoRA has the rank at which it trains about as many parameters as one active expert.
    """
    full = tiny(seed=seed)
    plain = AdapterConfig(num_experts=0)
    stage1 = full.pretrain
    rows = {
        "baseline": replace(stage1, adapters=plain, idar=replace(stage1.idar, coef=0.0)),
        "idar": replace(stage1, adapters=plain),
        "idar_paper": replace(stage1, adapters=plain, idar=IDARConfig.paper()),
        "moe": stage1,
    }
    recipes = {name: Recipe(config, None, full.evaluate) for name, config in rows.items()}
    return {**recipes, "ippo": full}
