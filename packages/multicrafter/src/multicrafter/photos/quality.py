"""How good a photo is: sharpness by a closed form, aesthetics by a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from id_reward import Scorer
    from PIL import Image

SIDE = 512  # longer side at which photos of different sizes are compared


def sharpness(picture: Image.Image) -> float:
    """Standard deviation of the Laplacian of the luma, in grey levels of 255, at a longer side of 512 pixels (Pech-Pacheco et al., 2000).

    Focused photos have about 8 to 40, blurred ones less than 4. A photo smaller than that is not enlarged: it would look blurred.
    """
    from PIL import Image

    small = picture.convert("L")
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    x = np.asarray(small, np.float64)
    if min(x.shape) < 3:
        return 0.0
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return float(laplacian.std())


@lru_cache(maxsize=4)
def aesthetics_scorer(name: str) -> Scorer | None:
    """The scorer behind ``closed_form``, ``hps:PATH`` or ``none``."""
    kind, _, path = name.partition(":")
    if kind == "none":
        return None
    if kind == "hps":
        return hps_scorer(path)
    return closed_form


def hps_scorer(path: str) -> Scorer:
    """HPSv2 or v2.1 from a local checkpoint (HPS_v2.1_compressed.pt), by id_reward."""
    from id_reward.backends.aesthetics import HPSv2Scorer

    return HPSv2Scorer.from_pretrained(path)


def closed_form(
    images: Sequence[Image.Image], prompts: Sequence[str], references: Sequence[Sequence[object]]
) -> Float[np.ndarray, " b"]:
    """Colourfulness and sharpness of edges in [0, 1] (`multicrafter.world.judges.aesthetics`), at a longer side of 512 pixels.

    A stand-in that needs no weights: not comparable with HPSv2, whose mean over the paper's data is .2552.
    """
    from PIL import Image

    from multicrafter.world.judges.aesthetics import aesthetics_scorer as score

    small = []
    for image in images:
        copy = image.copy()
        copy.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
        small.append(copy)
    return score(small, prompts, references)
