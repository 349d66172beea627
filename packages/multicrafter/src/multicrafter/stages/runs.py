"""Whole runs of a stage: data, loop, adapter on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multicrafter import loop
from multicrafter.adapters import Adapters
from multicrafter.data.synthetic import WorldConfig
from multicrafter.rewards import tiny_reward
from multicrafter.stages.align import Align, AlignConfig
from multicrafter.stages.data import EncodedScenes, encode_scenes
from multicrafter.stages.pretrain import Pretrain, PretrainConfig

if TYPE_CHECKING:
    from diffusers import FluxPipeline


def _check_resume(out: Path, config: dict[str, Any]) -> None:
    """Going on under another configuration would be neither run."""
    path = out / "config.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), json.loads(json.dumps(config, default=str))
    changed = [k for k in now if before.get(k) != now[k]]
    if changed:
        raise ValueError(f"--resume needs the configuration of {path}, but {', '.join(changed)} changed")


def run_pretrain(
    pipe: FluxPipeline, config: PretrainConfig, out: Path, *, scenes: EncodedScenes | None = None, resume: bool = False
) -> Adapters:
    """Stage 1 into ``out``: config.json, metrics.jsonl, checkpoints/, adapter/. ``scenes`` spares drawing them anew."""
    if resume:
        _check_resume(out, asdict(config))
    scenes = scenes or encode_scenes(pipe, config.world, config.num_scenes, seed=config.data_seed)
    stage = Pretrain(pipe, config, scenes)
    loop.run(
        stage,
        num_steps=config.num_steps,
        out=out,
        resume=resume,
        save_every=200,
        description="stage 1",
        config=asdict(config),
    )
    stage.adapters.save(out / "adapter", stage=1, num_references=config.world.numbers[0], steps=config.num_steps)
    return stage.adapters


def run_align(
    pipe: FluxPipeline,
    adapters: Adapters,
    config: AlignConfig,
    out: Path,
    *,
    num_references: int = 2,
    scenes: EncodedScenes | None = None,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Stage 2 into ``out``, as `run_pretrain`; returns the metrics of every iteration."""
    if resume:
        _check_resume(out, asdict(config))
    world = WorldConfig(numbers=(num_references,), shared_attributes=4)
    scenes = scenes or encode_scenes(pipe, world, 512, seed=config.seed + 10_000)
    stage = Align(pipe, adapters, config, scenes, tiny_reward(config.reward))
    history = loop.run(
        stage,
        num_steps=config.num_steps,
        out=out,
        resume=resume,
        save_every=10,
        description="stage 2",
        config=asdict(config),
    )
    adapters.save(out / "adapter", stage=2, num_references=num_references, steps=config.num_steps)
    return history
