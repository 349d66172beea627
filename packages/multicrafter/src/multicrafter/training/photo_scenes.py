"""A photo dataset as what both stages train on: encoded pictures, references, masks and prompts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from idar import token_masks
from torch import Tensor
from tqdm import tqdm

from multicrafter import UserError
from multicrafter.models.loaded import LoadedModel
from multicrafter.photos.loader import LoaderConfig, PhotoLoader
from multicrafter.photos.samples import Size
from multicrafter.photos.store import open_split
from multicrafter.photos.write import Record
from multicrafter.training.encoding_cache import CachedPictures, ScenesText

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from multicrafter.training.scenes import EncodedScenes

CHUNK = 16


def encode_photos(
    model: LoadedModel | DiffusionPipeline,
    folder: str | Path,
    *,
    num_subjects: int = 2,
    size: int | Size | None = None,
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
        size: Side of a picture in pixels, or (height, width); None takes the VAE's own.
        reference_size: Side of a reference; None takes half of the picture's shorter side.
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
    model = LoadedModel.of(model)
    side = size or model.picture_size
    shape = (side, side) if isinstance(side, int) else (side[0], side[1])
    (scenes,) = encode_shapes(
        model, folder, (shape,), num_subjects=num_subjects, reference_size=reference_size or min(shape) // 2, count=count,
        split=split, seed=seed, num_workers=num_workers, cache=cache, keep_pictures=keep_pictures, progress=progress,
    )  # fmt: skip
    return scenes


class _Gathered:
    """Encoded samples of one shape, as they come."""

    def __init__(self, text: ScenesText | None) -> None:
        self.parts: list[tuple[Tensor, ...]] = []
        self.pictures: list[tuple[Tensor, Tensor]] = []
        self.captions: list[str] = []
        self.people: list[list[str]] = []
        self.text = text

    def scenes(self, factor: int) -> EncodedScenes:
        """All of them; a token has ``factor`` pixels a side."""
        from multicrafter.training.scenes import EncodedScenes

        names = {name: i for i, name in enumerate(sorted({n for row in self.people for n in row}))}
        tokens, references, masks = (torch.cat(p) for p in zip(*self.parts, strict=True))
        images, reference_images = (torch.cat(p) for p in zip(*self.pictures, strict=True))
        grid, reference_grid = ((p.shape[-2] // factor, p.shape[-1] // factor) for p in (images, reference_images))
        return EncodedScenes(
            tokens=tokens,
            references=references,
            masks=masks,
            captions=self.captions,
            identities=torch.tensor([[[names[n]] for n in row] for row in self.people]),
            images=images,
            reference_images=reference_images,
            grid=grid,
            reference_grid=reference_grid,
            references_per_subject=references.shape[1] // masks.shape[1],
            text=self.text,
        )


@torch.no_grad()
def encode_shapes(
    model: LoadedModel,
    folder: str | Path,
    shapes: Sequence[Size],
    *,
    num_subjects: int,
    reference_size: int,
    reference_shapes: Sequence[Size] | None = None,
    references_per_subject: int = 1,
    count: int | None = None,
    split: str = "train",
    seed: int = 0,
    num_workers: int = 0,
    cache: str | Path | None = None,
    keep_pictures: int | None = None,
    keep_references: bool = False,
    progress: bool = False,
) -> list[EncodedScenes]:
    """Records with ``num_subjects`` subjects, each at the one of ``shapes`` (height, width) nearest to its own aspect.

    A crop keeps the faces inside where it can (`photos.samples.cover`); masks are cut alike. Arguments are those of `encode_photos`;
    ``count`` samples are of all shapes together, and with ``keep_references`` the references' pixels are kept of all of them (for stage 2).

    ``reference_shapes`` (height, width) stand in for squares of ``reference_size``; for them and ``references_per_subject`` see `LoaderConfig`.

    Returns:
        One `EncodedScenes` for each shape, number of references of each subject and shape of references that some record has.

    Raises:
        ValueError: The dataset has no such record, or the sizes do not fit the VAE.
    """
    factor, step = model.token_side, model.size_step
    small = reference_shapes or ((reference_size, reference_size),)
    asked = (("size", shapes), ("reference_size" if reference_shapes is None else "reference_shapes", small))
    for name, value in ((name, side) for name, given in asked for shape in given for side in shape):
        if value < step or value % step:
            raise UserError(f"{name} must be a positive multiple of {step} pixels, got {value}")
    config = LoaderConfig(
        batch=CHUNK,
        buckets=tuple(shapes),
        reference_size=reference_size,
        reference_shapes=None if reference_shapes is None else tuple(reference_shapes),
        references_per_subject=references_per_subject,
        num_subjects=num_subjects,
        drop_last=False,
        seed=seed,
        num_workers=num_workers,
    )
    loader = PhotoLoader(folder, config, split=split)
    count = count or len(loader.rows)
    encode = CachedPictures(model, cache)
    gathered: dict[tuple[int, ...], _Gathered] = {}
    done = 0
    with tqdm(
        total=count, desc=f"encode, {num_subjects} subjects", unit="photo", disable=not progress, file=sys.stderr
    ) as bar:
        for batch in loader:
            kept = slice(0, count - done)
            images, references = batch.images[kept], batch.references[kept]
            height, width = images.shape[-2:]
            key = (
                shapes.index((height, width)),
                references.shape[1],
                small.index((references.shape[-2], references.shape[-1])),
            )
            own = gathered.setdefault(
                key, _Gathered(ScenesText(model, cache) if model.backbone.text_sees_references else None)
            )
            encoded = encode(references.flatten(0, 1)).unflatten(0, references.shape[:2])
            grid = (height // factor, width // factor)
            own.parts.append((encode(images), encoded, token_masks(batch.masks[kept], grid)))
            left = len(images) if keep_pictures is None else max(0, keep_pictures - len(own.captions))
            own.pictures.append((images[:left], references if keep_references else references[:left]))
            own.captions += batch.captions[kept]
            if own.text is not None:
                own.text.add(batch.captions[kept], references)
            own.people += batch.identities[kept]
            done += len(images)
            bar.update(len(images))
            if done == count:
                break
    return [found.scenes(factor) for _, found in sorted(gathered.items())]


def encode_by_number(
    model: LoadedModel | DiffusionPipeline,
    folder: str | Path,
    count: int,
    *,
    size: int,
    reference_size: int,
    shapes: Sequence[Size] | None = None,
    reference_shapes: Sequence[Size] | None = None,
    references_per_subject: int = 1,
    seed: int = 0,
    cache: str | Path | None = None,
    keep_references: bool = False,
    progress: bool = False,
) -> list[EncodedScenes]:
    """About ``count`` samples of the train split: what `encode_shapes` gives for every number of subjects, in proportion to the records.

    ``shapes`` (height, width) stand in for squares of ``size``; ``keep_references`` as in `encode_shapes`.

    Raises:
        ValueError: See `encode_photos`.
    """
    shares = share_out(count, Counter(len(r["subjects"]) for r in training_records(folder)))
    return [
        scenes
        for number, samples in shares.items()
        for scenes in encode_shapes(
            LoadedModel.of(model), folder, shapes or ((size, size),), num_subjects=number, reference_size=reference_size,
            reference_shapes=reference_shapes, references_per_subject=references_per_subject,
            count=samples, seed=seed, cache=cache, keep_pictures=CHUNK, keep_references=keep_references, progress=progress,
        )
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
