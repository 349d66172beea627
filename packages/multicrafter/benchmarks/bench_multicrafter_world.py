"""Scenes a second of the tiny world (wanted: 2,000 on two cores), and one stage-1 step with and without attention supervision."""

from __future__ import annotations

import os

import pytest
import torch
from multicrafter.config.recipes import ablation
from multicrafter.pipeline import load_flux
from multicrafter.training.pretrain import Pretrain
from multicrafter.training.scenes import encode_scenes
from multicrafter.world import WorldConfig, make_scenes

FULL = os.environ.get("BENCH_SIZE") == "full"


@pytest.mark.parametrize("numbers", [(1,), (1, 2), (4,)], ids=str)
def test_scenes(benchmark, numbers):
    count = 1000 if FULL else 100
    generator = torch.Generator().manual_seed(0)
    benchmark.pedantic(
        make_scenes, (count, WorldConfig(numbers=numbers), generator), rounds=10 if FULL else 2, warmup_rounds=1
    )
    benchmark.extra_info["scenes_per_second"] = round(count / benchmark.stats.stats.median)


@pytest.mark.parametrize("row", ["baseline", "idar", "moe"])
def test_stage1_step(benchmark, row):
    """Named baseline: "baseline", plain LoRA."""
    pipe, config = load_flux(), ablation()[row].pretrain
    stage = Pretrain(pipe, config, encode_scenes(pipe, config.world, config.batch, seed=0))
    benchmark.pedantic(stage.step, (0,), rounds=20 if FULL else 1, warmup_rounds=2 if FULL else 0)
