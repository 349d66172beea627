"""A photo dataset as what stage 1 trains on: encoded pictures, references and masks of a FLUX."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from idar import token_masks
from torch import Tensor
from tqdm import tqdm

from multicrafter import UserError
from multicrafter.models.loaded import LoadedModel
from multicrafter.photos.loader import LoaderConfig, PhotoLoader
from multicrafter.photos.store import open_split
from multicrafter.photos.write import Record
from multicrafter.training.encoding_cache import CachedPictures, ScenesText

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from multicrafter.training.scenes import EncodedScenes

CHUNK = 16


@torch.no_grad()
def encode_photos(
    model: LoadedModel | DiffusionPipeline,
    folder: str | Path,
    *,
    num_subjects: int = 2,
    size: int | None = None,
    reference_size: int | None = None,
    count: int | None = None,
    split: str = "train",
    seed: int = 0,
    num_workers: int = 0,
    cache: str | Path | None = None,
    keep_pictures: int | None = None,
    progress: bool = False,
) -> EncodedScenes:
    """Encodes records with exactly ``num_subjects`` subjects, as `scenes.encode_scenes` does drawn scenes.

    Args:
        model: Whose VAE encodes.
        folder: A dataset of `multicrafter data build`.
        num_subjects: Subjects of a record.
        size: Side of a picture in pixels; None takes the VAE's own.
        reference_size: Side of a reference; None takes half of ``size``.
        count: Samples; more than there are records go through several epochs, with other crops and references. None: each record once.
        split: "train" or "test".
        seed: See `LoaderConfig`.
        num_workers: See `LoaderConfig`.
        cache: Folder of encoded pictures, see `CachedPictures`.
        keep_pictures: Keep the pixels of only so many samples, which stage 1 looks at now and then; None keeps all (stage 2 needs them).
        progress: Show a bar.

    Raises:
        ValueError: The dataset has no such record, or the sizes do not fit the VAE.
    """
    from multicrafter.training.scenes import EncodedScenes

    model = LoadedModel.of(model)
    size = size or model.picture_size
    reference_size = reference_size or size // 2
    factor = model.token_side
    if size % factor or reference_size % factor:
        raise UserError(f"size and reference_size must be multiples of {factor}, got {size} and {reference_size}")
    config = LoaderConfig(
        batch=CHUNK,
        buckets=((size, size),),
        reference_size=reference_size,
        num_subjects=num_subjects,
        drop_last=False,
        seed=seed,
        num_workers=num_workers,
    )
    loader = PhotoLoader(folder, config, split=split)
    count = count or len(loader.rows)
    grid, reference_grid = (size // factor,) * 2, (reference_size // factor,) * 2
    encode = CachedPictures(model, cache)
    text = ScenesText(model, cache) if model.backbone.text_sees_references else None
    parts: list[tuple[Tensor, ...]] = []
    pictures: list[tuple[Tensor, Tensor]] = []
    captions: list[str] = []
    people: list[list[str]] = []
    with tqdm(
        total=count, desc=f"encode, {num_subjects} subjects", unit="photo", disable=not progress, file=sys.stderr
    ) as bar:
        for batch in loader:
            kept = slice(0, count - len(captions))
            images, references = batch.images[kept], batch.references[kept]
            encoded = encode(references.flatten(0, 1)).unflatten(0, references.shape[:2])
            parts.append((encode(images), encoded, token_masks(batch.masks[kept], grid)))
            left = len(images) if keep_pictures is None else max(0, keep_pictures - len(captions))
            pictures.append((images[:left], references[:left]))
            captions += batch.captions[kept]
            if text is not None:
                text.add(batch.captions[kept], references)
            people += batch.identities[kept]
            bar.update(len(images))
            if len(captions) == count:
                break
    names = {name: i for i, name in enumerate(sorted({n for row in people for n in row}))}
    tokens, references, masks = (torch.cat(p) for p in zip(*parts, strict=True))
    images, reference_images = (torch.cat(p) for p in zip(*pictures, strict=True))
    return EncodedScenes(
        tokens=tokens,
        references=references,
        masks=masks,
        captions=captions,
        identities=torch.tensor([[[names[n]] for n in row] for row in people]),
        images=images,
        reference_images=reference_images,
        grid=grid,
        reference_grid=reference_grid,
        text=text,
    )


def encode_by_number(
    model: LoadedModel | DiffusionPipeline,
    folder: str | Path,
    count: int,
    *,
    size: int,
    reference_size: int,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = False,
) -> list[EncodedScenes]:
    """About ``count`` samples of the train split, one `EncodedScenes` per number of subjects, in proportion to the records: what stage 1 takes.

    Raises:
        ValueError: See `encode_photos`.
    """
    shares = share_out(count, Counter(len(r["subjects"]) for r in training_records(folder)))
    return [
        encode_photos(
            model, folder, num_subjects=number, size=size, reference_size=reference_size, count=samples, seed=seed,
            cache=cache, keep_pictures=CHUNK, progress=progress,
        )
        for number, samples in shares.items()
    ]  # fmt: skip


def training_records(folder: str | Path) -> list[Record]:
    """Records of the train split.

    Raises:
        ValueError: It is no dataset, or the split is empty.
    """
    records = open_split(folder, "train").records
    if not records:
        raise UserError(
            f"{folder} must hold records to train on, but its train split is empty: see dropped.jsonl and report.html there"
        )
    return records


def share_out(count: int, numbers: Mapping[int, int]) -> dict[int, int]:
    """``count`` samples over groups in proportion to their sizes, largest remainders first; every group gets at least one.

    >>> share_out(10, {2: 4, 1: 14, 3: 2})
    {1: 7, 2: 2, 3: 1}
    """
    total = sum(numbers.values())
    exact = {n: count * k / total for n, k in sorted(numbers.items())}
    shares = {n: int(x) for n, x in exact.items()}
    for n in sorted(exact, key=lambda n: shares[n] - exact[n])[: count - sum(shares.values())]:
        shares[n] += 1
    return {n: max(1, k) for n, k in shares.items()}
