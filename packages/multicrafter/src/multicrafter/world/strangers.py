"""People of the drawn world to try a model with, of whom no model has seen anybody."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from multicrafter.world.attributes import FAMILIES
from multicrafter.world.scenes import WorldConfig, make_references, make_scenes


def strangers(number: int, seed: int, *, side: int = 128) -> tuple[Float[Tensor, "number 3 side side"], str]:
    """Portraits of ``number`` people of the test split in [0, 1], and a caption of a scene with them.

    The people share two attributes, so that mixing them up shows. Another seed gives other people.
    """
    generator = torch.Generator().manual_seed(seed)
    world = WorldConfig(family="people", split="test", numbers=(number,), shared_attributes=2)
    scene = make_scenes(1, world, generator)
    family = FAMILIES["people"]
    portraits = make_references(family, scene.identities[0], side, generator)
    return portraits, scene.captions(family)[0]
