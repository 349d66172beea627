"""What the method costs beside plain LoRA: full-width slices (1 double, 1 single block) of FLUX.1-dev, two threads, one run a part.

    python -m studies.overhead stage1      # forward and backward: the method / plain LoRA
    python -m studies.overhead inference   # forward: the experts / plain LoRA
    python -m studies.overhead stage2      # an iteration / its own function evaluations
    python -m studies.overhead cache       # kept reference keys: drift and speed
    python -m studies.overhead page        # docs/results/overhead.md

Rank 512, 4 experts, top 1, base in bf16, adapters in fp32, as the recipes compute. Variants alternate within a round; a ratio is the
median over rounds of the ratios inside a round, and its spread is the smallest and the largest. Results: benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = REPOSITORY / "benchmarks" / "results" / "overhead.json"
SLICE = {"num_layers": 1, "num_single_layers": 1}


def ratios(work: dict[str, Callable[[], object]], baseline: str, rounds: int) -> dict:
    """Seconds and ratios of alternating variants."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for index in range(rounds):
        order = list(work)[:: 1 if index % 2 == 0 else -1]
        for name in order:
            start = time.perf_counter()
            work[name]()
            seconds[name].append(time.perf_counter() - start)
    pairs = {n: [a / b for a, b in zip(seconds[n], seconds[baseline], strict=True)] for n in work if n != baseline}
    return {
        "baseline": baseline, "rounds": rounds, "seconds": seconds,
        "ratios": {n: {"median": statistics.median(r), "low": min(r), "high": max(r)} for n, r in pairs.items()},
    }  # fmt: skip


def stages(shape, variants: dict):
    """Stages of stage 1 on slices that share nothing."""
    import torch
    from multicrafter.config.recipes import flux1_dev_stage1
    from multicrafter.models.backbones import get_backbone
    from multicrafter.plan.steps import PlannedPretrain, build

    run, made = flux1_dev_stage1(), {}
    for name, (adapters, idar) in variants.items():
        execution = replace(run.execution, gradient_checkpointing=False)
        config = replace(run.pretrain, adapters=adapters, idar=idar, execution=execution)
        _, attached = build(get_backbone("flux1_dev"), SLICE, execution, adapters)
        torch.manual_seed(0)
        stage = PlannedPretrain(attached, config, shape, rows=1)
        stage.optimizer.state.clear()  # not timed here, so not kept
        stage.planned.tokens.normal_()
        stage.planned.references.normal_()
        stage.text.embeds.normal_()
        stage.noise.normal_()
        made[name] = stage
    return made


def forward_backward(stage) -> None:
    """Losses and their gradients."""
    stage.forward_backward()


SHAPE = {"text": 128, "image": (16, 16), "reference": (20, 20), "references": 1}


def slices() -> dict:
    """Plain LoRA, and the method, on slices that share nothing."""
    from multicrafter.models.adapters import AdapterConfig
    from multicrafter.plan.steps import Shape
    from multicrafter.training.pretrain import IDARConfig

    plain, moe = AdapterConfig(rank=512, alpha=512.0, num_experts=0), AdapterConfig(rank=512, alpha=512.0)
    variants = {"plain LoRA": (plain, IDARConfig(coef=0.0)), "IDAR + experts": (moe, IDARConfig())}
    return stages(Shape(**SHAPE), variants)


def training(rounds: int) -> dict:
    """Forward and backward of stage 1."""
    work = {name: (lambda s=s: forward_backward(s)) for name, s in slices().items()}
    return {"allowed": 1.10, "shape": SHAPE, **ratios(work, "plain LoRA", rounds)}


def inference(rounds: int) -> dict:
    """One function evaluation."""
    import torch

    made = slices()

    @torch.no_grad()
    def once(stage) -> None:
        context = stage.planned.context(torch.arange(1), torch.device("cpu"))
        stage.trainee.predict(stage.planned.tokens, torch.full((1,), 0.5), stage.text, **context)

    def base() -> None:
        with made["IDAR + experts"].adapters.disable():
            once(made["IDAR + experts"])

    work = {
        "plain LoRA": lambda: once(made["plain LoRA"]),
        "experts": lambda: once(made["IDAR + experts"]),
        "no adapter": base,
    }
    return {"allowed": 1.05, "shape": SHAPE, **ratios(work, "plain LoRA", rounds)}


def cache(rounds: int) -> dict:
    """Whether reference keys depend on the noise (full-width slices), and what keeping them saves where they do not."""
    import torch
    from multicrafter.models.backbones import BACKBONES, ReferenceCache
    from multicrafter.models.backbones.drift import reference_drift
    from multicrafter.models.flux.model import Text
    from multicrafter.plan.steps import Shape, build
    from multicrafter.training.precision import ExecutionConfig

    drift, work = {}, {}
    shape = Shape(128, (32, 32), (20, 20), 2)
    for backbone in BACKBONES:
        from multicrafter.models.adapters import AdapterConfig

        execution = ExecutionConfig(dtype="bfloat16")
        transformer, attached = build(backbone, SLICE, execution, AdapterConfig(rank=16, alpha=16.0))
        attached.detach()
        torch.manual_seed(0)
        d, bf16 = transformer.config.in_channels, torch.bfloat16
        tokens = torch.randn(1, 1024, d, dtype=bf16)
        references = [torch.randn(1, 400, d, dtype=bf16) for _ in range(2)]
        empty = backbone.empty_text(transformer, 1, shape.text)
        text = Text(torch.randn_like(empty.embeds).to(bf16), None if empty.pooled is None else empty.pooled.to(bf16))
        options = {"image_grid": (32, 32), "references": references, "reference_grids": [(20, 20)] * 2}
        found = reference_drift(backbone, transformer, text, tokens=tokens, **options)
        drift[backbone.name] = {"largest": max(found.values()), "claimed_exact": backbone.caches_references}
        if backbone.caches_references:
            sigma = torch.full((1,), 0.5)
            kept = ReferenceCache()

            @torch.no_grad()
            def plain(b=backbone, t=transformer, x=tokens, text=text, options=options, sigma=sigma):
                return b.velocity(t, x, sigma, text, **options)

            @torch.no_grad()
            def cached(b=backbone, t=transformer, x=tokens, text=text, options=options, sigma=sigma, kept=kept):
                return b.velocity(t, x, sigma, text, cache=kept, **options)

            cached()
            difference = (plain().float() - cached().float()).abs().max().item()
            work = {"references in every step": plain, "references kept": cached}
            speed = {
                **ratios(work, "references in every step", rounds),
                "largest_difference": difference,
                "backbone": backbone.name,
            }
        del transformer, attached
    return {"shape": shape._asdict(), "drift": drift, **speed}


def stage2(rounds: int) -> dict:
    """A whole iteration (rollout, advantages, both epochs of the update, optimizer) against the same passes of the model alone."""
    import torch
    from gspo import FlowSDE, PolicyConfig, PolicyTrainer, group_advantages, rollout
    from multicrafter.config.recipes import flux1_dev_stage2
    from multicrafter.models.adapters import AdapterConfig
    from multicrafter.models.backbones import get_backbone
    from multicrafter.plan.steps import PlannedPolicy, Shape, build
    from multicrafter.training.optimization import AdamWConfig

    execution = replace(flux1_dev_stage2().execution, gradient_checkpointing=False)
    _, attached = build(get_backbone("flux1_dev"), SLICE, execution, AdapterConfig(rank=512, alpha=512.0))
    group, window = 2, (0, 1)
    # at learning rate 0 every rollout is on policy, as in training: a stale one is passed over once more
    policy = PlannedPolicy(attached, execution, Shape(**SHAPE), rows=group, lr=0.0, adamw=AdamWConfig())
    trained = list(attached.parameters())
    trainer = PolicyTrainer(trained, policy.optimizer, PolicyConfig(clip_range=1e-3))
    kernel, sigmas = FlowSDE(), torch.linspace(1, 0, 5)
    torch.manual_seed(0)
    noise = torch.randn_like(policy.planned.tokens[:1])

    def velocity(x, sigma, index):
        part = slice(0, len(x))
        context = policy.planned.context(part, torch.device("cpu"))
        return policy.trainee.predict(x, sigma, policy.text[part], **context)

    def iteration():
        drawn = rollout(velocity, noise, sigmas, kernel=kernel, window=window, group_size=group)
        advantages = group_advantages(drawn.latents.flatten(1).mean(1), drawn.index)
        done = trainer.update(velocity, drawn, advantages, kernel)
        assert (drawn.num_function_evaluations, done.num_function_evaluations) == (4 * group, 6 * group)

    x, sigma = noise.repeat(group, 1, 1), torch.full((group,), 0.5)
    weight = torch.randn_like(x)

    def passes():
        with torch.no_grad():
            for _ in range(4 + 2):
                velocity(x, sigma, None)
        for _ in range(4):
            (velocity(x, sigma, None) * weight).sum().backward()
        for parameter in trained:
            parameter.grad = None

    work = {"function evaluations alone": passes, "iteration": iteration}
    return {"allowed": 1.03, "shape": SHAPE, **ratios(work, "function evaluations alone", rounds)}


def page() -> str:
    """Markdown of docs/results/overhead.md."""
    content = json.loads(OUT.read_text()) if OUT.exists() else {}
    text = (
        "# What the method costs\n\nFull-width slices of FLUX.1-dev (1 double and 1 single block, width 3072), rank 512, 4 experts, top 1, base in bf16, "
        "adapters in fp32, two threads of a CPU; variants alternate in one run. Medians of the ratios inside a round, and their spread.\n\n"
        "| what | against | ratio | spread | allowed | rounds |\n|---|---|---|---|---|---|\n"
    )
    for part in ("stage1", "inference", "stage2"):
        if part not in content:
            continue
        r = content[part]
        name = {
            "stage1": "stage 1, forward and backward", "inference": "function evaluation",
            "stage2": "stage 2, 4 steps of 2 members, 2 epochs",
        }[part]  # fmt: skip
        for variant, q in r["ratios"].items():
            allowed = f"{r['allowed']:.2f}" if variant in ("IDAR + experts", "experts", "iteration") else ""
            text += f"| {name}: {variant} | {r['baseline']} | {q['median']:.3f} | {q['low']:.3f} - {q['high']:.3f} | {allowed} | {r['rounds']} |\n"
    text += (
        "\nTokens: 128 text, 256 image, one reference of 400. Plain LoRA has the same rank on attention and on both linears of every FFN. A stage-2 iteration is "
        "compared with as many forward and backward passes of the same model; its optimizer step counts as overhead, decoding and rewards do not take part.\n"
    )
    if "cache" in content:
        r = content["cache"]
        text += (
            "\n## Keeping keys and values of the references\n\nRelative change of the reference keys between sigma 0.9 and 0.3, largest of the slice's "
            "blocks. Where it is not zero a cache would change the picture, and is refused.\n\n| backbone | largest change | kept |\n|---|---|---|\n"
        )
        for name, d in r["drift"].items():
            text += f"| {name} | {d['largest']:.3g} | {'yes' if d['claimed_exact'] else 'no'} |\n"
        q = r["ratios"]["references kept"]
        text += (
            f"\nOn {r['backbone']} a step with kept references takes {q['median']:.2f} ({q['low']:.2f} - {q['high']:.2f}) of one with two references of 400 "
            f"tokens in the sequence; the velocities differ by at most {r['largest_difference']:.2g} (bf16).\n"
        )
    where = content.get("circumstances", {"commit": "not run yet", "device": "no device", "versions": {"torch": "?"}})
    return text + (
        "\n    python -m studies.overhead stage1|inference|stage2|cache\n\n"
        f"Commit `{where['commit'][:12]}`, {where['device']}, torch {where['versions']['torch']}.\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("stage1", "inference", "stage2", "cache", "page"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    import torch

    from benchmarks.run import circumstances

    if arguments.part == "page":
        (REPOSITORY / "docs" / "results" / "overhead.md").write_text(page())
        return
    torch.set_num_threads(2)
    part = {"stage1": training, "inference": inference, "stage2": stage2, "cache": cache}[arguments.part]
    result = {arguments.part: part(arguments.rounds)}
    content = json.loads(OUT.read_text()) if OUT.exists() else {"what": __doc__}
    content |= {"circumstances": circumstances(), **result}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({k: v["ratios"] for k, v in result.items()}, indent=1), flush=True)


if __name__ == "__main__":
    main()
