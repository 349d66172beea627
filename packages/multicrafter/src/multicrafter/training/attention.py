"""Where a model looks on encoded scenes: they are noised to a level, the model runs once, and its attention is watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from idar import Direction, SubjectLayout, leakage
from idar.capture import CapturedMaps
from idar.integrations.diffusers import attention_blocks, capture_subject_attention
from jaxtyping import Float
from torch import Tensor

from multicrafter.models.backbones import Backbone
from multicrafter.models.binding import by_subject
from multicrafter.models.flux.model import Text, add_noise
from multicrafter.models.loaded import LoadedModel
from multicrafter.training.scenes import EncodedScenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Predict = Callable[..., Tensor]
"""(tokens, sigma, text, **context) -> velocity: `Trainee.predict`, or `Backbone.velocity` of a transformer."""


def layout_of(backbone: Backbone, scenes: EncodedScenes, text: Text) -> SubjectLayout:
    """Where everything is in the joint sequence; the references of one subject are one span."""
    return by_subject(backbone.layout_of(text, scenes.grid, scenes.reference_grids), scenes.counts)


def noised_velocity(
    predict: Predict,
    scenes: EncodedScenes,
    rows: Tensor | slice,
    noise: Float[Tensor, "b n d"],
    sigma: Float[Tensor, " b"],
    text: Text,
) -> Float[Tensor, "b n d"]:
    """Velocity that a model predicts for scenes noised to ``sigma``, where ``noise`` is."""
    latents = scenes.tokens[rows].to(noise.device)
    return predict(add_noise(latents, noise, sigma), sigma, text, **scenes.context(rows, noise.device))


@torch.no_grad()
def watch_attention(
    transformer: Any,
    backbone: Backbone,
    scenes: EncodedScenes,
    rows: Tensor | slice,
    text: Text,
    *,
    sigma: float,
    generator: torch.Generator,
    predict: Predict | None = None,
    device: torch.device | None = None,
    direction: Direction = "image_to_reference",
    blocks: Callable[[str], bool] | Sequence[str] | None = None,
    keep_blocks: bool = False,
) -> CapturedMaps:
    """Noises scenes to one level, runs the model on them once and returns the attention it paid.

    Args:
        transformer: Whose attention is watched.
        backbone: Of it.
        scenes: Encoded scenes.
        rows: Which of them.
        text: Their prompts.
        sigma: Noise level in [0, 1].
        generator: Of the noise, on the CPU.
        predict: What runs the transformer; by default the backbone does.
        device: Where it runs; by default where the transformer is.
        direction: Which arrows, see `idar`.
        blocks: Which blocks; the double-stream ones by default.
        keep_blocks: Keep every block's maps too.
    """

    def velocity(tokens: Tensor, level: Tensor, text: Text, **context: Any) -> Tensor:
        return backbone.velocity(transformer, tokens, level, text, **context)

    latents = scenes.tokens[rows]
    device = device or next(transformer.parameters()).device
    noise, text = torch.randn(latents.shape, generator=generator).to(device), text.to(device)
    level = torch.full((len(latents),), sigma, device=noise.device)
    layout = layout_of(backbone, scenes, text)
    with capture_subject_attention(
        transformer, layout, direction=direction, blocks=blocks, keep_blocks=keep_blocks
    ) as captured:
        noised_velocity(predict or velocity, scenes, rows, noise, level, text)
    return captured


def attention_shares(maps: Float[Tensor, "b s n"], grid: tuple[int, int]) -> Float[Tensor, "b s h w"]:
    """Attention on each reference as a share of that on all references, as pictures."""
    shares: Tensor = (maps / maps.sum(1, keepdim=True).clamp_min(1e-9)).unflatten(2, grid)
    return shares


@torch.no_grad()
def measure_leakage(
    model: LoadedModel | DiffusionPipeline,
    scenes: EncodedScenes,
    *,
    direction: Direction,
    blocks: Callable[[str], bool] | None = None,
    sigmas: tuple[float, ...] = (0.3, 0.6, 0.8),
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Attention leakage (n,), mean over subjects, blocks (the double-stream ones by default) and sigmas; NaN where masks hide each other."""
    return measure_leakages(model, scenes, {"": blocks}, direction=direction, sigmas=sigmas, seed=seed, batch=batch)[""]


@torch.no_grad()
def measure_leakages(
    model: LoadedModel | DiffusionPipeline,
    scenes: EncodedScenes,
    groups: Mapping[str, Callable[[str], bool] | None],
    *,
    direction: Direction,
    sigmas: tuple[float, ...] = (0.3, 0.6, 0.8),
    seed: int = 0,
    batch: int = 64,
) -> dict[str, Tensor]:
    """`measure_leakage` of several groups of blocks, by name, in the same passes."""
    generator = torch.Generator().manual_seed(seed)
    model = LoadedModel.of(model)
    names = {group: list(attention_blocks(model.transformer, blocks)) for group, blocks in groups.items()}
    together = list(dict.fromkeys(name for chosen in names.values() for name in chosen))
    total = {group: torch.zeros(len(scenes)) for group in groups}
    for sigma in sigmas:
        for start in range(0, len(scenes), batch):
            part = slice(start, min(start + batch, len(scenes)))
            captured = watch_attention(
                model.transformer, model.backbone, scenes, part, scenes.encode_text(model, part),
                sigma=sigma, generator=generator, direction=direction, blocks=together, keep_blocks=True,
            )  # fmt: skip
            for group, chosen in names.items():
                maps = torch.stack([captured.blocks[n] for n in chosen]).mean(0).cpu()
                total[group][part] += leakage(maps, scenes.masks[part]).nanmean(1)
    return {group: value / len(sigmas) for group, value in total.items()}
