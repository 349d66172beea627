"""An RL update of the tiny FLUX against the same forward and backward passes of the model alone (the named baseline)."""

from __future__ import annotations

import os

import pytest
import torch
from gspo import FlowSDE, PolicyConfig, PolicyTrainer, group_advantages, rollout

FULL = os.environ.get("BENCH_SIZE") == "full"


@pytest.mark.parametrize("form", ["forward and backward", "update"])
def test_update(benchmark, form):
    pytest.importorskip("multicrafter")
    from gspo.examples.flux_jpeg import PROMPTS, load
    from gspo.integrations.diffusers import PipelinePolicy
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe = load(None)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    actor = PipelinePolicy(pipe, PROMPTS, height=64, width=64)
    drawn = rollout(
        actor,
        actor.noise(),
        actor.sigmas(8),
        kernel=FlowSDE(),
        window=(1, 2),
        group_size=12 if FULL else 2,
        tail_steps=1,
    )
    advantages = group_advantages(drawn.latents.flatten(1).mean(1), drawn.index)
    trainer = PolicyTrainer(trained, torch.optim.AdamW(trained, lr=1e-4), PolicyConfig(clip_range=1e-5))
    weight = torch.randn_like(drawn.latents)

    def velocity(step):
        return actor(step.latents, torch.full((len(weight),), step.sigma), drawn.index)

    def bare():
        for epoch in range(2):
            for step in drawn.trajectory if epoch else ():
                with torch.no_grad():
                    velocity(step)
            for step in drawn.trajectory:
                (velocity(step) * weight).sum().backward()
            for parameter in trained:
                parameter.grad = None

    def update():
        trainer.update(actor, drawn, advantages, FlowSDE())

    benchmark.group = "update of the tiny FLUX"
    benchmark.pedantic(bare if form.startswith("forward") else update, rounds=10 if FULL else 2, warmup_rounds=1)
