"""What training and inference need of a FLUX pipeline: text, latents, the velocity with references, and a sampler.

sigma runs from 1 (noise) to 0 (data): ``latents_sigma = (1 - sigma) * latents + sigma * noise``, ``velocity = noise - latents``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicrafter.models.flux.packing import Grid, diagonal_ids

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel


class Text(NamedTuple):
    """Encoded prompts: token embeddings (b, n, d) and, where the model has one, a pooled vector (b, p) (FLUX.1: T5 and CLIP).

    A mask (b, n) says which tokens are real, where some are padding that the model must not see (Qwen-Image). Where references stand between
    the words (Qwen-Image 2.1), slots (b, s) say how many words precede each; they are read as numbers, and stay on the CPU.
    """

    embeds: Float[Tensor, "b n d"]
    pooled: Float[Tensor, "b p"] | None
    mask: Bool[Tensor, "b n"] | None = None
    slots: Int[Tensor, "b s"] | None = None

    def rows(self, index: Tensor | slice) -> Text:
        """Rows ``index`` of all."""
        pooled, mask = (None if part is None else part[index] for part in (self.pooled, self.mask))
        slots = None if self.slots is None else self.slots[index.cpu() if isinstance(index, Tensor) else index]
        return Text(self.embeds[index], pooled, mask, slots)

    def __getitem__(self, index: Tensor | slice | int) -> Any:  # type: ignore[override]
        """`rows`; a plain int keeps the tuple's meaning."""
        return tuple.__getitem__(self, index) if isinstance(index, int) else self.rows(index)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Text:
        """All on another device, the numbers in another dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        mask = None if self.mask is None else self.mask.to(device)
        return Text(self.embeds.to(device, dtype), pooled, mask, self.slots)


def text_length(pipe: FluxPipeline) -> int:
    """Text tokens this pipeline was made for: T5's maximum length, at most 512 as in FLUX.1-dev."""
    return min(int(pipe.tokenizer_2.model_max_length), 512)


def encode_prompts(pipe: FluxPipeline, prompts: Sequence[str]) -> Text:
    """Encodes prompts exactly as FluxPipeline does: T5 states without a mask, CLIP's pooled output.

    Differentiable, so that the tiny base can train its text encoders; wrap in `torch.no_grad` otherwise.
    """
    device = pipe.text_encoder.device
    ids = pipe.tokenizer_2(
        list(prompts), padding="max_length", max_length=text_length(pipe), truncation=True, return_tensors="pt"
    ).input_ids
    embeds = pipe.text_encoder_2(ids.to(device))[0]
    clip_ids = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=min(pipe.tokenizer.model_max_length, 77),
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return Text(embeds, pipe.text_encoder(clip_ids.to(device)).pooler_output)


def encode_images(vae: AutoencoderKL, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
    """Latents of pictures in [0, 1]: the posterior's mean, shifted and scaled as FLUX does."""
    mean = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mean
    found: Tensor = (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return found


def decode_latents(vae: AutoencoderKL, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Pictures in [0, 1] of latents, the inverse of `encode_images`."""
    raw = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    found: Tensor = (vae.decode(raw).sample.float() / 2 + 0.5).clamp(0, 1)
    return found


def add_noise(latents: Tensor, noise: Tensor, sigma: Float[Tensor, " b"]) -> Tensor:
    """``(1 - sigma) * latents + sigma * noise`` (rectified flow, arXiv 2209.03003)."""
    s = sigma.reshape(-1, *[1] * (latents.dim() - 1)).to(latents.dtype)
    return (1 - s) * latents + s * noise


def predict_velocity(
    transformer: FluxTransformer2DModel,
    tokens: Float[Tensor, "b n d"],
    sigma: Float[Tensor, " b"],
    text: Text,
    *,
    image_grid: Grid,
    references: Sequence[Float[Tensor, "b m d"]] = (),
    reference_grids: Sequence[Grid] = (),
    guidance: float | Float[Tensor, " b"] = 1.0,
    position_ids: Float[Tensor, "m 3"] | None = None,
) -> Float[Tensor, "b n d"]:
    """Velocity of the image tokens of a FLUX.1, given text and clean reference tokens (other models: `multicrafter.models.backbones`).

    Args:
        transformer: The FLUX transformer, adapters included.
        tokens: Packed noisy latents.
        sigma: Noise level of each row, in [0, 1].
        text: Encoded prompts.
        image_grid: Token rows and columns of the picture.
        references: Packed latents of each reference.
        reference_grids: Token rows and columns of each reference.
        guidance: Distilled guidance, one number or one per row, used where the transformer embeds it (FLUX.1-dev, the tiny FLUX).
        position_ids: Of image and references; by default the UNO layout (`flux.packing.diagonal_ids`).

    Raises:
        ValueError: ``references`` and ``reference_grids`` differ in number or size.
    """
    sizes = [r.shape[1] for r in references]
    if sizes != [rows * columns for rows, columns in reference_grids]:
        raise ValueError(
            f"reference_grids must match the references' token counts {sizes}, got {list(reference_grids)}"
        )
    ids = (diagonal_ids(image_grid, reference_grids) if position_ids is None else position_ids).to(tokens.device)
    embedded = None
    if transformer.config.guidance_embeds:
        embedded = torch.as_tensor(guidance, dtype=torch.float32, device=tokens.device).expand(len(tokens))
    output = transformer(
        hidden_states=torch.cat([tokens, *references], dim=1),
        encoder_hidden_states=text.embeds,
        pooled_projections=text.pooled,
        timestep=sigma,
        guidance=embedded,
        img_ids=ids,
        txt_ids=torch.zeros(text.embeds.shape[1], 3, device=tokens.device),
        return_dict=False,
    )[0]
    found: Tensor = output[:, : tokens.shape[1]]
    return found


def sigma_schedule(num_steps: int, *, shift: float = 1.0) -> Float[Tensor, " t"]:
    """``num_steps + 1`` noise levels from 1 to 0: ``shift * s / (1 + (shift - 1) * s)`` of a uniform s (SD3, arXiv 2403.03206, Eq. 23).

    >>> sigma_schedule(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def sample(
    velocity_fn: Callable[[Tensor, Tensor], Tensor],
    noise: Float[Tensor, "b n d"],
    sigmas: Float[Tensor, " t"],
    *,
    progress: Callable[[int], object] | None = None,
    after: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Float[Tensor, "b n d"]:
    """Euler steps of the probability-flow ODE: ``x += (sigma_next - sigma) * velocity(x, sigma)``.

    Args:
        velocity_fn: Maps (tokens, sigma (b,)) to the velocity.
        noise: Where to start.
        sigmas: Strictly decreasing noise levels, the last one where to stop.
        progress: Called with the number of steps done after each.
        after: Called with a step's index and its result; what it returns replaces the result, None ends the sampling.
    """
    x, sigmas = noise, sigmas.to(noise.device)
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        velocity = velocity_fn(x, sigma.expand(len(x)))
        x = x + (sigma_next - sigma) * velocity
        if progress is not None:
            progress(step + 1)
        if after is not None:
            kept = after(step, x)
            if kept is None:
                break
            x = kept
    return x
