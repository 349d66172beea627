"""An RL update of the tiny FLUX against the same forward and backward passes of the model alone (the named baseline)."""

from __future__ import annotations

import os
import statistics
import time

import torch
from gspo import FlowSDE, PolicyConfig, PolicyTrainer, group_advantages, rollout

FULL = os.environ.get("BENCH_SIZE") == "full"


def test_update(benchmark):
    """Both take turns within a round: two rounds in a row differ by more than what is measured."""
    from gspo.examples.flux_jpeg import PROMPTS, load
    from gspo.integrations.diffusers import PipelinePolicy
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe = load(None, teaching_steps=1)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    actor = PipelinePolicy(pipe, PROMPTS, height=64, width=64, max_sequence_length=8)
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
    # at learning rate 0 the rollout stays on policy: another round would find it stale, and pass over it once more
    trainer = PolicyTrainer(trained, torch.optim.AdamW(trained, lr=0.0), PolicyConfig(clip_range=1e-5))
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

    pairs: list[tuple[float, float]] = []

    def both():
        seconds = []
        for work in (bare, lambda: trainer.update(actor, drawn, advantages, FlowSDE())):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        pairs.append((seconds[0], seconds[1]))

    benchmark.group = "update of the tiny FLUX"
    benchmark.pedantic(both, rounds=40 if FULL else 2, warmup_rounds=1)
    ratios = sorted(update / alone for alone, update in pairs[1:])
    benchmark.extra_info |= {
        "baseline": "forward and backward passes alone",
        "baseline_ms": 1e3 * statistics.median(alone for alone, _ in pairs[1:]),
        "update_ms": 1e3 * statistics.median(update for _, update in pairs[1:]),
        "ratio": statistics.median(ratios),
        "quartiles": (ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]),
    }
