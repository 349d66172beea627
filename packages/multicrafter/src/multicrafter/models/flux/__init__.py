"""FLUX with in-context references: token layout, velocities, sampling, and the tiny FLUX that ships."""

from pathlib import Path

from multicrafter.models.flux.model import (
    Text,
    add_noise,
    decode_latents,
    encode_images,
    encode_prompts,
    predict_velocity,
    sample,
    sigma_schedule,
)
from multicrafter.models.flux.packing import Grid, diagonal_ids, pack_latents, reference_spans, unpack_latents


def shipped() -> Path:
    """Folder of the tiny FLUX that ships with the package, a diffusers pipeline directory."""
    return Path(__file__).parents[2] / "world" / "weights" / "tiny_flux"


__all__ = [
    "Grid",
    "Text",
    "add_noise",
    "decode_latents",
    "diagonal_ids",
    "encode_images",
    "encode_prompts",
    "pack_latents",
    "predict_velocity",
    "reference_spans",
    "sample",
    "shipped",
    "sigma_schedule",
    "unpack_latents",
]
