"""A closed form for aesthetics at the scale of the tiny world: colourfulness and sharpness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from multicrafter.world.judges.people import as_tensor


def colourfulness(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """``sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2)``, rg = R - G, yb = (R + G) / 2 - B (Hasler and Suesstrunk, 2003)."""
    red, green, blue = pictures.unbind(1)
    rg, yb = (red - green).flatten(1), ((red + green) / 2 - blue).flatten(1)
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return spread + 0.3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt()


def sharpness(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Share of the gradient's energy in its largest tenth: edges that are steep rather than smeared, in [0.1, 1]."""
    grey = pictures.mean(1)
    energy = (grey[:, 1:, 1:] - grey[:, 1:, :-1]).square() + (grey[:, 1:, 1:] - grey[:, :-1, 1:]).square()
    flat = energy.flatten(1).sort(1, descending=True).values
    top = max(1, flat.shape[1] // 10)
    return flat[:, :top].sum(1) / flat.sum(1).clamp_min(1e-8)


def aesthetics(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """``(tanh(2 colourfulness) + sharpness) / 2`` in [0, 1]."""
    return (torch.tanh(2 * colourfulness(pictures)) + sharpness(pictures)) / 2


def aesthetics_scorer(
    images: Sequence[Any] | Tensor, prompts: Sequence[str], references: Sequence[Sequence[Any]]
) -> np.ndarray:
    """`aesthetics` with id_reward's scorer signature."""
    return np.array([aesthetics(p[None]).item() for p in as_tensor(images)])
