"""A photo dataset as what stage 1 trains on: encoded pictures, references and masks of a FLUX."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from idar import token_masks

from multicrafter.backbones import backbone_of
from multicrafter.data.photos.loader import LoaderConfig, PhotoLoader

if TYPE_CHECKING:
    from diffusers import FluxPipeline

    from multicrafter.stages.data import EncodedScenes


@torch.no_grad()
def encode_photos(
    pipe: FluxPipeline,
    folder: str | Path,
    *,
    num_subjects: int = 2,
    size: int | None = None,
    reference_size: int | None = None,
    count: int | None = None,
    split: str = "train",
    seed: int = 0,
    num_workers: int = 0,
) -> EncodedScenes:
    """Encodes records with exactly ``num_subjects`` subjects, as `stages.data.encode_scenes` does drawn scenes.

    Args:
        pipe: The FLUX whose VAE encodes.
        folder: A dataset of `multicrafter data build`.
        num_subjects: Subjects of a record.
        size: Side of a picture in pixels; None takes the VAE's own.
        reference_size: Side of a reference; None takes half of ``size``.
        count: Samples; more than there are records go through several epochs, with other crops and references. None: each record once.
        split: "train" or "test".
        seed: See `LoaderConfig`.
        num_workers: See `LoaderConfig`.

    Raises:
        ValueError: The dataset has no such record.
    """
    from multicrafter.stages.data import EncodedScenes

    size = size or int(pipe.vae.config.sample_size)
    reference_size = reference_size or size // 2
    backbone = backbone_of(pipe)
    factor = backbone.token_side(pipe)
    if size % factor or reference_size % factor:
        raise ValueError(f"size and reference_size must be multiples of {factor}, got {size} and {reference_size}")
    config = LoaderConfig(
        batch=1,
        buckets=((size, size),),
        reference_size=reference_size,
        num_subjects=num_subjects,
        seed=seed,
        num_workers=num_workers,
    )
    loader = PhotoLoader(folder, config, split=split)
    grid, reference_grid = (size // factor,) * 2, (reference_size // factor,) * 2
    rows = []
    for batch in islice(loader, count or len(loader.rows)):
        references = backbone.encode_pictures(pipe, batch.references.flatten(0, 1))[None]
        tokens = backbone.encode_pictures(pipe, batch.images)
        rows.append((tokens, references, token_masks(batch.masks, grid), batch))
    batches = [r[3] for r in rows]
    names = sorted({name for b in batches for name in b.identities[0]})
    unknown = torch.full((len(rows),), -1)
    return EncodedScenes(
        tokens=torch.cat([r[0] for r in rows]),
        references=torch.cat([r[1] for r in rows]),
        masks=torch.cat([r[2] for r in rows]),
        captions=[b.captions[0] for b in batches],
        identities=torch.tensor([[[names.index(n)] for n in b.identities[0]] for b in batches]),
        images=torch.cat([b.images for b in batches]),
        reference_images=torch.cat([b.references for b in batches]),
        setting=unknown,
        time=unknown.clone(),
        grid=grid,
        reference_grid=reference_grid,
    )
