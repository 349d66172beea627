"""Which form of the attention loss works: short stage-1 runs on the shipped tiny FLUX, one JSON each (docs/adr/0021).

    python -m studies.idar_losses --form r2i-dice-max --coef 0.3 --out runs/idar_study

Everything but the loss is the same: data, order, noise, adapters (plain LoRA), steps. Measured on held-out identities.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from idar import leakage, map_iou, peak_in_mask
from idar.integrations.diffusers import capture_subject_attention
from multicrafter.models.adapters import AdapterConfig
from multicrafter.models.flux.model import add_noise
from multicrafter.models.loaded import LoadedModel
from multicrafter.pipeline import load_flux
from multicrafter.training.attention import layout_of
from multicrafter.training.pretrain import IDARConfig, Pretrain, PretrainConfig
from multicrafter.training.scenes import encode_scenes

R2I, I2R = "reference_to_image", "image_to_reference"
FORMS = {
    "none": None,
    "r2i-dice-max": (R2I, "dice", "max"),
    "r2i-dice-minmax": (R2I, "dice", "minmax"),
    "r2i-soft_iou-max": (R2I, "soft_iou", "max"),
    "r2i-cross_entropy": (R2I, "cross_entropy", "none"),
    "r2i-share_cross_entropy": (R2I, "share_cross_entropy", "none"),
    "i2r-dice-max": (I2R, "dice", "max"),
    "i2r-dice-share": (I2R, "dice", "share"),
    "i2r-soft_iou-share": (I2R, "soft_iou", "share"),
    "i2r-cross_entropy": (I2R, "cross_entropy", "none"),
    "i2r-share_cross_entropy": (I2R, "share_cross_entropy", "none"),
}
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)


@torch.no_grad()
def measure(pipe, scenes, batch: int = 64) -> dict[str, object]:
    """Attention and diffusion loss on held-out scenes, per noise level; the same noise for every run."""
    found: dict[str, dict[str, list[float]]] = {
        d: {"leakage": [], "map_iou": [], "peak_in_mask": []} for d in (R2I, I2R)
    }
    losses, model = [], LoadedModel.of(pipe)
    for sigma in SIGMAS:
        generator = torch.Generator().manual_seed(5)
        rows: dict[str, list[torch.Tensor]] = {R2I: [], I2R: []}
        total = 0.0
        for start in range(0, len(scenes), batch):
            part = slice(start, min(start + batch, len(scenes)))
            latents = scenes.tokens[part]
            noise = torch.randn(latents.shape, generator=generator)
            level = torch.full((len(latents),), sigma)
            text = scenes.encode_text(model, part)
            layout = layout_of(model.backbone, scenes, text)
            with (
                capture_subject_attention(pipe.transformer, layout, direction=R2I) as looks,
                capture_subject_attention(pipe.transformer, layout, direction=I2R) as takes,
            ):
                velocity = model.velocity(add_noise(latents, noise, level), level, text, **scenes.context(part))
            rows[R2I].append(looks.maps)
            rows[I2R].append(takes.maps)
            total += (velocity - (noise - latents)).square().mean((1, 2)).sum().item()
        losses.append(total / len(scenes))
        for direction in (R2I, I2R):
            maps = torch.cat(rows[direction])
            for name, metric in (("leakage", leakage), ("map_iou", map_iou), ("peak_in_mask", peak_in_mask)):
                found[direction][name].append(metric(maps, scenes.masks).nanmean().item())
    return {"sigmas": SIGMAS, "diffusion_loss": losses, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--coef", type=float, default=0.3)
    parser.add_argument("--sigma-max", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=800)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    name = f"{options.form}-{options.coef:g}-{options.sigma_max:g}-{options.seed}"
    target = options.out / f"{name}.json"
    if target.exists():
        return
    form = FORMS[options.form]
    supervision = IDARConfig(coef=0.0)
    if form is not None:
        direction, kind, normalization = form
        supervision = IDARConfig(
            coef=options.coef, direction=direction, kind=kind, normalization=normalization, sigma_max=options.sigma_max
        )
    pipe = load_flux()
    config = PretrainConfig(
        num_steps=options.steps,
        batch=options.batch,
        num_scenes=options.scenes,
        seed=options.seed,
        adapters=AdapterConfig(num_experts=0),
        idar=supervision,
    )
    train = encode_scenes(pipe, config.world, options.scenes, seed=config.data_seed)
    test = encode_scenes(pipe, replace(config.world, split="test"), options.held_out, seed=7)
    stage = Pretrain(pipe, config, train)
    started, history = time.monotonic(), []
    for step in range(options.steps):
        history.append(stage.step(step))
        if step % 20 == 0:
            print(name, step, {k: round(v, 4) for k, v in history[-1].items()}, flush=True)
    report = {
        "form": options.form,
        "coef": 0.0 if form is None else options.coef,
        "sigma_max": options.sigma_max,
        "seed": options.seed,
        "steps": options.steps,
        "batch": options.batch,
        "scenes": options.scenes,
        "held_out": options.held_out,
        "seconds": round(time.monotonic() - started, 1),
        "measured": measure(pipe, test),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.rename(target)


if __name__ == "__main__":
    main()
