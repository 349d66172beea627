"""What a person wants to see while a stage trains: where tokens look, which experts they take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from multicrafter import renamed
from multicrafter.models.flux.model import Text
from multicrafter.training.attention import attention_shares, watch_attention
from multicrafter.training.scenes import EncodedScenes
from multicrafter.training.trainee import Trainee

renamed(__name__, {"Look": "Preview", "look_at": "make_preview"})


class Preview(NamedTuple):
    """Pictures (3, H, W) in [0, 1] and scalars, by name, for a tracker."""

    pictures: dict[str, Tensor]
    metrics: dict[str, float]


def heat(maps: Float[Tensor, "s h w"]) -> Float[Tensor, "s 3 h w"]:
    """Shares in [0, 1] as colours from dark blue over red to yellow."""
    x = maps.clamp(0, 1)
    return torch.stack([(2 * x).clamp(0, 1), (2 * x - 1).clamp(0, 1), 0.3 * (1 - x)], 1)


def row_of(pictures: list[Tensor], *, size: int, gap: int = 2) -> Float[Tensor, "3 H W"]:
    """Pictures side by side, each scaled to a height of ``size`` (nearest), a white gap between them."""
    scaled = [
        torch.nn.functional.interpolate(p[None], size=(size, round(size * p.shape[2] / p.shape[1])), mode="nearest")[0]
        for p in pictures
    ]
    white = torch.ones(3, size, gap)
    return torch.cat([part for p in scaled for part in (p, white)][:-1], 2)


def routing_picture(loads: Float[Tensor, "l e"], *, cell: int = 12) -> Float[Tensor, "3 H W"]:
    """One row per layer, one column per expert: its share of the tokens (a uniform router is evenly lit)."""
    shares = loads / loads.max(1, keepdim=True).values.clamp_min(1e-9)
    grid = heat(shares[None])[0]
    return grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


@torch.no_grad()
def make_preview(
    trainee: Trainee, scenes: EncodedScenes, text: Text, rows: Tensor, *, sigma: float = 0.6, seed: int = 0
) -> Preview:
    """Attention and routing on some scenes: each row shows the target, the references, and the share of attention on each of them.

    All ranks call it (a sharded model computes together). The training's random numbers are not touched.
    """
    captured = watch_attention(
        trainee.adapters.transformer, trainee.adapters.backbone, scenes, rows, text.to(trainee.device),
        sigma=sigma, generator=torch.Generator().manual_seed(seed), predict=trainee.predict, device=trainee.device,
    )  # fmt: skip
    share = attention_shares(captured.maps.float().cpu(), scenes.grid)
    strips = []
    for row, maps_of_row in zip(rows.tolist(), share, strict=True):
        shown = [scenes.images[row], *scenes.reference_images[row], *heat(maps_of_row)]
        strips.append(row_of([p.float() for p in shown], size=scenes.images.shape[-2]))
    pictures, metrics = {"attention": torch.cat(strips, 1)}, {}
    experts = trainee.adapters.experts
    if experts is not None:
        found: dict[str, Any] = experts.stats()
        experts.forget()
        for name, statistics in found.items():
            metrics[f"routing/{name}/entropy"] = float(statistics.load_entropy)
            for expert, load in enumerate(statistics.load.tolist()):
                metrics[f"routing/{name}/load_{expert}"] = load
        pictures["routing"] = routing_picture(torch.stack([s.load for s in found.values()]))
    return Preview(pictures, metrics)
