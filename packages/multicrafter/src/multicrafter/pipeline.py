"""Inference: pictures from references and a prompt, on any FLUX in diffusers format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from multicrafter import flux
from multicrafter.adapters import Adapters
from multicrafter.flux.model import (
    decode_latents,
    encode_images,
    encode_prompts,
    predict_velocity,
    sample,
    sigma_schedule,
)
from multicrafter.flux.packing import pack_latents, unpack_latents

if TYPE_CHECKING:
    from diffusers import FluxPipeline

PARTS = (
    "model_index.json",
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)


def load_flux(model: str | Path | None = None, *, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """A `FluxPipeline` from a folder or hub id; the shipped tiny one by default.

    Raises:
        ValueError: The folder lacks a part, or its files cannot be read.
    """
    from diffusers import FluxPipeline
    from diffusers.utils import logging

    source = Path(model) if model is not None else flux.shipped()
    if source.exists() or model is None:
        missing = [part for part in PARTS if not (source / part).exists()]
        if missing:
            raise ValueError(f"model {source} must be a diffusers FLUX directory, but it lacks {', '.join(missing)}")
    logging.disable_progress_bar()
    try:
        pipe = FluxPipeline.from_pretrained(source if source.exists() else str(model), torch_dtype=dtype)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model {model or source} must be a readable FLUX directory or hub id, got {type(error).__name__}: {reason}"
        ) from None
    finally:
        logging.enable_progress_bar()
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    return pipe


def to_tensor(picture: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    """A picture as a square in [0, 1]: scaled to fit, the rest grey."""
    square = ImageOps.pad(picture.convert("RGB"), (size, size), method=Image.Resampling.LANCZOS, color=(128, 128, 128))
    return torch.from_numpy(np.asarray(square, np.float32) / 255).permute(2, 0, 1)


def to_image(picture: Float[Tensor, "3 h w"]) -> Image.Image:
    """A tensor in [0, 1] as a picture."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


class MultiCrafterPipeline:
    """Several given subjects in one picture.

    >>> # MultiCrafterPipeline.from_pretrained(adapter="runs/demo/stage2/adapter")("two people in the park", references=[a, b])[0]
    """

    def __init__(
        self, pipe: FluxPipeline, adapters: Adapters | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Takes a loaded FLUX, with adapters already attached."""
        self.pipe, self.adapters, self.notes = pipe, adapters, notes or {}

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, *, adapter: str | Path | None = None, dtype: torch.dtype = torch.float32
    ) -> MultiCrafterPipeline:
        """Loads a FLUX (folder or hub id, by default the shipped tiny one) and an adapter folder.

        Raises:
            ValueError: See `load_flux` and `Adapters.load`.
        """
        pipe = load_flux(model, dtype=dtype)
        if adapter is None:
            return cls(pipe)
        return cls(pipe, *Adapters.load(pipe.transformer, adapter))

    @property
    def size(self) -> int:
        """Side of a picture in pixels."""
        return int(self.pipe.vae.config.sample_size)

    @property
    def max_references(self) -> int:
        """References the adapter was trained for; 1 for a base."""
        return int(self.notes.get("num_references", 1))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        references: Sequence[Image.Image],
        *,
        num_images: int = 1,
        num_steps: int = 20,
        seed: int = 0,
        guidance: float = 3.5,
        progress: Callable[[int], object] | None = None,
    ) -> list[Image.Image]:
        """Draws ``num_images`` pictures.

        Args:
            prompt: What the picture shows.
            references: One picture per subject; each is padded to a square of half the picture's side.
            num_images: Pictures, each from its own noise.
            num_steps: Euler steps.
            seed: Of the noise.
            guidance: Distilled guidance, where the model embeds it.
            progress: Called with the number of steps done.

        Raises:
            ValueError: No prompt, no reference, or a number below 1.
        """
        if not prompt.strip():
            raise ValueError("prompt must not be empty")
        if not references:
            raise ValueError("references must hold at least one picture, got none")
        if num_images < 1 or num_steps < 1:
            raise ValueError(f"num_images and num_steps must be at least 1, got {num_images} and {num_steps}")
        vae, device = self.pipe.vae, self.pipe.transformer.device
        factor = 2 * 2 ** (len(vae.config.block_out_channels) - 1)
        grid, reference_grid = (self.size // factor,) * 2, (self.size // 2 // factor,) * 2
        pictures = torch.stack([to_tensor(r, self.size // 2) for r in references]).to(device)
        tokens = [t.expand(num_images, -1, -1) for t in pack_latents(encode_images(vae, pictures)).split(1)]
        text = encode_prompts(self.pipe, [prompt] * num_images)
        noise = torch.randn(
            num_images, grid[0] * grid[1], tokens[0].shape[2], generator=torch.Generator().manual_seed(seed)
        ).to(device)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return predict_velocity(
                self.pipe.transformer, x, sigma, text,
                image_grid=grid, references=tokens, reference_grids=[reference_grid] * len(tokens), guidance=guidance,
            )  # fmt: skip

        latents = sample(velocity, noise, sigma_schedule(num_steps), progress=progress)
        return [to_image(p) for p in decode_latents(vae, unpack_latents(latents, grid))]
