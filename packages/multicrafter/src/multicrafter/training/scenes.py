"""Encoded scenes of several subjects, drawn once and shared by the runs that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from idar import token_masks
from jaxtyping import Float, Int
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid
from multicrafter.models.loaded import LoadedModel
from multicrafter.training.encoding_cache import CachedPictures, ScenesText
from multicrafter.world import FAMILIES, Scenes, WorldConfig, make_scenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Truth(NamedTuple):
    """What drawn scenes show, as the evaluation knows it."""

    identities: Int[Tensor, "n m a"]
    setting: Int[Tensor, " n"]
    time: Int[Tensor, " n"]


@dataclass(kw_only=True)
class EncodedScenes:
    """n scenes with m subjects and r references each, drawn or of photos, as a model takes them.

    Attributes:
        tokens: Encoded pictures, one row per patch of ``grid``.
        references: Encoded references, one row per patch of ``reference_grid``.
        masks: Share of each patch that a subject covers, in [0, 1].
        captions: n prompts.
        images: Pictures in [0, 1]; of photos perhaps only the first few.
        reference_images: References in [0, 1], as many, or all.
        grid: Rows and columns of patches.
        reference_grid: Of a reference.
        references_per_subject: r / m: neighbouring references that show one subject.
        identities: Who is shown; of drawn subjects their attributes, of photos a number per person.
        setting: Index of the place, if the scenes were drawn.
        time: Index of the time of day, if the scenes were drawn.
        reference_poses: How the references were drawn, for evaluation only, as `world.Scenes` has it; so are the next two.
        reference_heights: In pixels.
        reference_light: Factor on colours.
        strangers: An unrelated identity for every scene.
        text: Encoded prompts, of a base whose text encoder looks at the references.
    """

    tokens: Float[Tensor, "n tokens d"]
    references: Float[Tensor, "n r reference_tokens d"]
    masks: Float[Tensor, "n m tokens"]
    captions: list[str]
    images: Float[Tensor, "k 3 h w"]
    reference_images: Float[Tensor, "j r 3 rh rw"]
    grid: tuple[int, int]
    reference_grid: tuple[int, int]
    references_per_subject: int = 1
    identities: Int[Tensor, "n m a"] | None = None
    setting: Int[Tensor, " n"] | None = None
    time: Int[Tensor, " n"] | None = None
    reference_poses: Float[Tensor, "n r p"] | None = None
    reference_heights: Float[Tensor, "n r"] | None = None
    reference_light: Float[Tensor, "n r 3"] | None = None
    strangers: Int[Tensor, "n a"] | None = None
    text: ScenesText | None = None

    def __post_init__(self) -> None:
        rows, columns = self.grid
        tokens, masks = tuple(self.tokens.shape), tuple(self.masks.shape)
        fits = tokens[1] == rows * columns and masks == (tokens[0], self.num_subjects, tokens[1])
        if self.references.shape[1] != self.num_subjects * self.references_per_subject:
            raise ValueError(
                f"references must be {self.references_per_subject} of each of the {self.num_subjects} subjects that have masks, got "
                f"{self.references.shape[1]}"
            )
        if not fits or len(self.captions) != tokens[0]:
            raise ValueError(
                f"tokens, masks and captions must be of the same scenes on the grid {self.grid}, got {tokens}, {masks} "
                f"and {len(self.captions)} captions"
            )

    @property
    def truth(self) -> Truth:
        """What is shown.

        Raises:
            ValueError: Nobody knows, since the scenes were not drawn.
        """
        if self.identities is None or self.setting is None or self.time is None:
            raise ValueError("scenes must be drawn ones to be compared with the truth, got scenes of photos")
        return Truth(self.identities, self.setting, self.time)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_subjects(self) -> int:
        """In each scene: m."""
        return self.masks.shape[1]

    @property
    def reference_grids(self) -> list[Grid]:
        """Of every reference."""
        return [self.reference_grid] * self.references.shape[1]

    @property
    def counts(self) -> list[int] | None:
        """How many references show each subject (`models.binding.by_subject`); None where it is one each."""
        return None if self.references_per_subject == 1 else [self.references_per_subject] * self.num_subjects

    def subject_pictures(self, rows: slice = slice(None)) -> list[list[Tensor]]:
        """One reference of every subject, for who compares subjects: of several the first."""
        return [list(pictures) for pictures in self.reference_images[rows, :: self.references_per_subject]]

    def encode_text(self, model: LoadedModel, rows: Tensor | slice) -> Text:
        """Encoded prompts of some rows: those that are kept, else encoded now."""
        if self.text is not None:
            return self.text(rows)
        if model.backbone.text_sees_references:
            raise ValueError(
                f"scenes must hold their text for {model.backbone.name}, whose prompts are encoded with references"
            )
        captions = self.captions[rows] if isinstance(rows, slice) else [self.captions[int(row)] for row in rows]
        return model.encode_prompts(captions)

    def context(self, rows: Tensor | slice, device: torch.device | None = None) -> dict[str, Any]:
        """References and grids of some rows, as `Backbone.velocity` takes them."""
        references = list(self.references[rows].to(device or self.references.device).unbind(1))
        return {
            "image_grid": self.grid,
            "references": references,
            "reference_grids": self.reference_grids,
        }


ENCODED = (
    "tokens", "references", "masks", "identities", "images", "reference_images", "setting", "time", "reference_poses",
    "reference_heights", "reference_light",
)  # fmt: skip


@torch.no_grad()
def draw_scenes(
    world: WorldConfig, count: int, *, seed: int, chunk: int = 100, one_by_one: bool = False
) -> Iterator[tuple[Scenes, Tensor | None]]:
    """The scenes of `encode_scenes`, in chunks; with ``one_by_one`` also an unrelated identity a scene, (b, a)."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        if not one_by_one:
            yield make_scenes(stop - start, world, generator), None
            continue
        alone, strangers = [], []
        for case in range(start, stop):
            own = torch.Generator().manual_seed(seed * 1_000_003 + case)
            alone.append(make_scenes(1, world, own))
            strangers.append(FAMILIES[world.family].sample(1, world.split, own))
        yield Scenes(*(torch.cat(part) for part in zip(*alone, strict=True))), torch.cat(strangers)


def encode_scenes(
    model: LoadedModel | DiffusionPipeline,
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

    Raises:
        ValueError: The world has several numbers of subjects, or sizes that are not whole tokens.
    """
    if len(world.numbers) != 1:
        raise UserError(f"numbers must hold one number of subjects, got {world.numbers}")
    model = LoadedModel.of(model)
    encode = CachedPictures(model, cache)
    text = ScenesText(model, cache) if model.backbone.text_sees_references else None
    grid = token_grid(model, world.height_width, name="size" if world.shape is None else "shape")
    reference_grid = token_grid(
        model,
        world.reference_height_width,
        name="reference_size" if world.reference_shape is None else "reference_shape",
    )
    parts: list[tuple[Tensor, ...]] = []
    captions: list[str] = []
    strangers: list[Tensor] = []
    for scenes, unrelated in draw_scenes(world, count, seed=seed, chunk=chunk, one_by_one=one_by_one):
        if unrelated is not None:
            strangers.append(unrelated)
        described = scenes.captions(FAMILIES[world.family])
        captions += described
        if text is not None:
            text.add(described, scenes.references)
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
    drawn = [torch.cat(part) for part in zip(*parts, strict=True)]
    return EncodedScenes(
        **dict(zip(ENCODED, drawn, strict=True)), captions=captions, grid=grid, reference_grid=reference_grid,
        references_per_subject=world.references_per_subject,
        strangers=torch.cat(strangers) if strangers else None, text=text,
    )  # fmt: skip


def token_grid(model: LoadedModel, size: tuple[int, int], *, name: str) -> Grid:
    """Token rows and columns of pictures of a height and a width in pixels.

    Raises:
        ValueError: These are not whole tokens; ``name`` says of what.
    """
    side, step = model.token_side, model.size_step
    for value in size:
        if value < step or value % step:
            raise UserError(f"{name} must be a positive multiple of {step} pixels, got {value}")
    return size[0] // side, size[1] // side


def encode_shaped_scenes(
    model: LoadedModel | DiffusionPipeline,
    world: WorldConfig,
    count: int,
    shapes: Sequence[tuple[int, int]] | None,
    *,
    reference_shapes: Sequence[tuple[int, int]] | None = None,
    seed: int,
    cache: str | Path | None = None,
) -> list[EncodedScenes]:
    """``count`` scenes drawn in several shapes (height, width) of pictures and references, as many of each: one `EncodedScenes` a pair.

    None is the world's own.

    Raises:
        ValueError: See `encode_scenes`; or there are more pairs of shapes than scenes.
    """
    model = LoadedModel.of(model)
    for name, given in (("shapes", shapes), ("reference_shapes", reference_shapes)):
        for shape in given or ():
            token_grid(model, shape, name=name)  # before the first is drawn
    worlds = [
        replace(world, shape=shape, reference_shape=reference)
        for shape in shapes or (world.shape,)
        for reference in reference_shapes or (world.reference_shape,)
    ]
    if len(worlds) > max(count, 1):
        raise UserError(f"shapes must be at most the number of scenes ({count}), got {len(worlds)}")
    parts = [count * (i + 1) // len(worlds) - count * i // len(worlds) for i in range(len(worlds))]
    return [
        encode_scenes(model, one, part, seed=seed + i, cache=cache)
        for i, (one, part) in enumerate(zip(worlds, parts, strict=True))
    ]


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
        """Of all scenes that do not hold their encoded text."""
        return [c for b in self.buckets if b.text is None for c in b.captions]

    def draw(self, generator: torch.Generator) -> EncodedScenes:
        """The bucket of one step; draws nothing where there is only one."""
        if len(self.buckets) == 1:
            return self.buckets[0]
        return self.buckets[int(torch.multinomial(self._weights, 1, generator=generator))]
