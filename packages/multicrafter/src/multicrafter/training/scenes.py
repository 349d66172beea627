"""Encoded scenes of several subjects, drawn once and shared by the runs that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from idar import token_masks
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.backbones import backbone_of
from multicrafter.training.encoding_cache import CachedPictures
from multicrafter.world import FAMILIES, Scenes, WorldConfig, make_scenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class EncodedScenes:
    """tokens (n, 64, d), references (n, m, 16, d), masks (n, m, 64), identities (n, m, a), setting and time (n,), pictures.

    How the references were drawn (poses, heights, light: see `Scenes`) is there if they were, for evaluation only; so is an unrelated
    identity for every scene, ``strangers`` (n, a).
    """

    tokens: Tensor
    references: Tensor
    masks: Tensor
    captions: list[str]
    identities: Tensor
    images: Tensor
    reference_images: Tensor
    setting: Tensor
    time: Tensor
    grid: tuple[int, int]
    reference_grid: tuple[int, int]
    reference_poses: Tensor | None = None
    reference_heights: Tensor | None = None
    reference_light: Tensor | None = None
    strangers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def context(self, rows: Tensor | slice, device: torch.device | None = None) -> dict[str, Any]:
        """References and grids of some rows, as `Backbone.velocity` takes them."""
        references = list(self.references[rows].to(device or self.references.device).unbind(1))
        return {
            "image_grid": self.grid,
            "references": references,
            "reference_grids": [self.reference_grid] * len(references),
        }


@torch.no_grad()
def encode_scenes(
    pipe: DiffusionPipeline,
    world: WorldConfig,
    count: int,
    *,
    seed: int,
    chunk: int = 100,
    cache: str | Path | None = None,
    one_by_one: bool = False,
) -> EncodedScenes:
    """Draws ``count`` scenes with as many subjects each as the world's single number, and encodes them (once, with a ``cache`` folder).

    With ``one_by_one`` every scene has a generator of its own, and a stranger: the first twelve of a hundred are the twelve of a dozen.
    """
    if len(world.numbers) != 1:
        raise UserError(f"numbers must hold one number of subjects, got {world.numbers}")
    generator = torch.Generator().manual_seed(seed)
    backbone = backbone_of(pipe)
    encode = CachedPictures(pipe, cache, backbone=backbone)
    factor = backbone.token_side(pipe)
    grid, reference_grid = (world.size // factor,) * 2, (world.reference_size // factor,) * 2
    parts: list[tuple[Tensor, ...]] = []
    captions: list[str] = []
    strangers: list[Tensor] = []
    for start in range(0, count, chunk):
        if one_by_one:
            drawn_alone = []
            for case in range(start, min(start + chunk, count)):
                own = torch.Generator().manual_seed(seed * 1_000_003 + case)
                drawn_alone.append(make_scenes(1, world, own))
                strangers.append(FAMILIES[world.family].sample(1, world.split, own))
            scenes = Scenes(*(torch.cat(part) for part in zip(*drawn_alone, strict=True)))
        else:
            scenes = make_scenes(min(chunk, count - start), world, generator)
        captions += scenes.captions(FAMILIES[world.family])
        references = encode(scenes.references.flatten(0, 1))
        tokens = encode(scenes.images)
        parts.append(
            (
                tokens,
                references.unflatten(0, scenes.references.shape[:2]),
                token_masks(scenes.masks.clamp(0, 1), grid),
                scenes.identities,
                scenes.images,
                scenes.references,
                scenes.setting,
                scenes.time,
                scenes.reference_poses,
                scenes.reference_heights,
                scenes.reference_light,
            )
        )
    tokens, references, masks, identities, images, pictures, setting, time, *drawn = (
        torch.cat(p) for p in zip(*parts, strict=True)
    )
    encoded = EncodedScenes(
        tokens, references, masks, captions, identities, images, pictures, setting, time, grid, reference_grid, *drawn
    )
    return replace(encoded, strangers=torch.cat(strangers)) if strangers else encoded


class Buckets:
    """Scenes by their layout: a batch never mixes numbers or sizes of references, so not one token is padding.

    Every rank and every micro-batch of a step has the same layout, hence equal work. A bucket is drawn in proportion to its
    scenes, so every scene is equally likely.
    """

    def __init__(self, scenes: EncodedScenes | Sequence[EncodedScenes]) -> None:
        """One `EncodedScenes` per layout."""
        self.buckets = [scenes] if isinstance(scenes, EncodedScenes) else list(scenes)
        if not self.buckets or not all(len(b) for b in self.buckets):
            raise ValueError(f"scenes must hold at least one scene per bucket, got {[len(b) for b in self.buckets]}")
        self._weights = torch.tensor([float(len(b)) for b in self.buckets])

    @property
    def captions(self) -> list[str]:
        """Of all scenes."""
        return [c for b in self.buckets for c in b.captions]

    def draw(self, generator: torch.Generator) -> EncodedScenes:
        """The bucket of one step; draws nothing where there is only one."""
        if len(self.buckets) == 1:
            return self.buckets[0]
        return self.buckets[int(torch.multinomial(self._weights, 1, generator=generator))]
