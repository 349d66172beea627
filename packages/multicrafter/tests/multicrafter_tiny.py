"""Tiny pipelines of every backbone, with random weights, and what is drawn with them."""

from __future__ import annotations

import torch
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.world.tiny_backbones import (
    tiny_flux1,
    tiny_flux2_dev,
    tiny_klein,
    tiny_kontext,
    tiny_qwen,
    tiny_qwen21,
)
from multicrafter.world.tiny_flux import TinyFluxConfig
from PIL import Image

CONFIG = TinyFluxConfig(num_heads=2, head_dim=16, num_double=1, num_single=1, vae_channels=(8, 8, 8), text_width=16)


def filled(pipe):
    """Frozen, and every weight moved a little so that all of them matter."""
    generator = torch.Generator().manual_seed(1)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    for parameter in pipe.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return pipe


MAKERS = {
    "flux1_dev": lambda: tiny_flux1(CONFIG, guidance_embeds=True),
    "flux1_kontext": lambda: tiny_kontext(CONFIG),
    "flux2_klein": tiny_klein,
    "flux2_klein_kv": lambda: tiny_klein(kv=True),
    "flux2_dev": tiny_flux2_dev,
    "qwen_image_edit": tiny_qwen,
    "qwen_image_edit_2509": lambda: tiny_qwen(zero_cond_t=False),
    "qwen_image_21": tiny_qwen21,
}
"""By the backbone's name."""


def tiny(name):
    """The pipeline of a backbone, `filled`."""
    return filled(MAKERS[name]())


def smooth_pictures():
    """Three of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(3)
    return torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4, generator=generator), 64, mode="bilinear")


def with_adapter(pipe, **notes):
    """A pipeline with an adapter that draws something else."""
    adapters = Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2), seed=3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return MultiCrafterPipeline(pipe, adapters, {"num_references": 2, "size": 64, **notes})


RED, BLUE, GREEN = (Image.new("RGB", (40, 60), c) for c in ((200, 40, 40), (40, 40, 200), (40, 200, 40)))


def latents(pipeline, prompt, references, **options):
    """Latents of pictures of two steps."""
    return torch.stack(pipeline(prompt, references, output_type="latent", **{"num_steps": 2, **options}))
