"""Tiny pipelines of every backbone, with random weights."""

from __future__ import annotations

import torch
from multicrafter.world.tiny_backbones import (
    tiny_flux1,
    tiny_flux2_dev,
    tiny_klein,
    tiny_kontext,
    tiny_qwen,
    tiny_qwen21,
)
from multicrafter.world.tiny_flux import TinyFluxConfig

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


def tiny(name):
    """The pipeline of a backbone by its name."""
    makers = {
        "flux1_dev": lambda: tiny_flux1(CONFIG, guidance_embeds=True),
        "flux1_kontext": lambda: tiny_kontext(CONFIG),
        "flux2_klein": tiny_klein,
        "flux2_klein_kv": lambda: tiny_klein(kv=True),
        "flux2_dev": tiny_flux2_dev,
        "qwen_image_edit": tiny_qwen,
        "qwen_image_edit_2509": lambda: tiny_qwen(zero_cond_t=False),
        "qwen_image_21": tiny_qwen21,
    }
    return filled(makers[name]())


def smooth_pictures():
    """Three of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(3)
    return torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4, generator=generator), 64, mode="bilinear")
