"""Recipe of the tiny FLUX's VAE: ``python -m multicrafter.world.train_vae --out DIR``."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from multicrafter.world import WorldConfig, make_scenes
from multicrafter.world.precision import fast_autocast
from multicrafter.world.tiny_flux import TinyFluxConfig, build_vae

KL_COEF = 1e-4  # nats per latent element; keeps the latents near unit scale and smooth


def vae_loss(
    pictures: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"], mean: Tensor, logvar: Tensor
) -> Tensor:
    """``L1 + L2 + L1 of finite differences + KL_COEF * KL(q || N(0, 1))``, pictures in [-1, 1]."""
    error = reconstruction - pictures
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + error.square().mean() + edges + KL_COEF * kl


def draw_pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes (count, 3, 64, 64) and references (count, 3, 32, 32) in [-1, 1]; one in six is of the object family."""
    family = "objects" if torch.rand((), generator=generator) < 1 / 6 else "people"
    scenes = make_scenes(count, WorldConfig(family=family, numbers=(1, 2, 3, 4), weights=(3, 4, 1, 1)), generator)
    return scenes.images * 2 - 1, scenes.references[:, 0] * 2 - 1


def train(
    out: Path, *, minutes: float, seed: int = 0, batch: int = 24, start: Path | None = None, lr: float = 2e-3
) -> dict[str, Any]:
    """Trains the VAE for ``minutes`` (from ``start`` if given), writes it to ``out`` with its scaling factor, and returns what was measured."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(start) if start else build_vae(TinyFluxConfig())
    vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    started, step = time.monotonic(), 0
    bar = tqdm(total=100, unit="%", desc="vae")
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        loss = torch.zeros(())
        for pictures, share in zip(draw_pictures(batch, generator), (1.0, 0.3), strict=True):
            with fast_autocast():
                posterior = vae.encode(pictures).latent_dist
                reconstruction = vae.decode(posterior.sample(generator)).sample
            loss = loss + share * vae_loss(
                pictures, reconstruction.float(), posterior.mean.float(), posterior.logvar.float()
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        bar.update(int(100 * progress) - bar.n)
        if step % 20 == 0:
            bar.set_postfix(step=step, loss=f"{loss.item():.4f}")
    bar.close()
    with torch.no_grad():
        held_out = torch.Generator().manual_seed(10_000 + seed)
        latents, errors = [], []
        for _ in range(8):
            pictures, _ = draw_pictures(32, held_out)
            mean = vae.encode(pictures).latent_dist.mean
            latents.append(mean)
            errors.append((vae.decode(mean).sample.clamp(-1, 1) - pictures).square().mean((1, 2, 3)) / 4)
        flat = torch.cat(latents)
    vae.register_to_config(scaling_factor=1 / flat.std().item(), shift_factor=flat.mean().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out)
    report = {
        "seed": seed,
        "steps": step,
        "pictures": step * batch * 2,
        "seconds": round(time.monotonic() - started),
        "psnr_db": round(float(-10 * torch.cat(errors).mean().log10()), 2),
        "latent_std": flat.std().item(),
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--start", type=Path, help="a VAE to go on from")
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    print(
        json.dumps(
            train(
                arguments.out,
                minutes=arguments.minutes,
                seed=arguments.seed,
                batch=arguments.batch,
                start=arguments.start,
                lr=arguments.lr,
            ),
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
