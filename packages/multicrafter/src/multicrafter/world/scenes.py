"""Scenes and references of the tiny world: subjects composed over a background, with exact masks and a caption.

Nothing in the caption gives an identity away; the references show each subject in another pose, scale and light.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicrafter import UserError, renamed
from multicrafter.models.checks import check_finite
from multicrafter.world.attributes import FAMILIES, PEOPLE, Family, Split
from multicrafter.world.render import POSE_SIZE, box, circle, draw

renamed(__name__, {"References": "DrawnReferences"})

SETTINGS = ("park", "beach", "room", "street", "desert", "snow")
TIMES = ("day", "sunset", "night")
NUMBERS = ("one", "two", "three", "four")
ARRANGEMENTS = {
    1: ("on the left", "in the middle", "on the right"),
    2: ("close together", "far apart", "one behind the other"),
    3: ("in a row", "in a group"),
    4: ("in a row", "in a group"),
}
_BACKDROPS = {  # above the horizon, below it, horizon in [0, 1]
    "park": ((0.62, 0.82, 0.95), (0.45, 0.70, 0.35), 0.55),
    "beach": ((0.35, 0.66, 0.86), (0.93, 0.85, 0.62), 0.62),
    "room": ((0.86, 0.76, 0.66), (0.56, 0.38, 0.26), 0.72),
    "street": ((0.66, 0.62, 0.64), (0.42, 0.42, 0.45), 0.60),
    "desert": ((0.97, 0.80, 0.58), (0.84, 0.56, 0.34), 0.50),
    "snow": ((0.74, 0.80, 0.88), (0.93, 0.95, 0.98), 0.58),
}
_LIGHTS = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.82, 0.70), "night": (0.62, 0.68, 0.90)}
_SKIES = {"day": (1.0, 1.0, 1.0), "sunset": (1.05, 0.62, 0.55), "night": (0.20, 0.22, 0.42)}


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What is drawn.

    Attributes:
        family: "people" or "objects".
        split: Which identities may appear.
        size: Side of a scene in pixels.
        shape: Height and width of a scene in pixels, where it is no square of ``size``.
        reference_size: Side of a reference in pixels.
        reference_shape: Height and width of a reference in pixels, where it is no square of ``reference_size``.
        references_per_subject: References of each subject, which stand side by side.
        numbers: Numbers of subjects a scene may have.
        shared_attributes: How many attributes every further subject of a scene shares with the first one, at most
            (drawn uniformly from 0 to this): look-alikes.
        weights: How often each of ``numbers`` is drawn, in proportion; none draws all alike.
    """

    family: str = "people"
    split: Split = "train"
    size: int = 64
    shape: tuple[int, int] | None = None
    reference_size: int = 32
    reference_shape: tuple[int, int] | None = None
    references_per_subject: int = 1
    numbers: tuple[int, ...] = (1, 2)
    shared_attributes: int = 0
    weights: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        check_finite(self)
        if self.family not in FAMILIES:
            raise UserError(f"family must be one of {tuple(FAMILIES)}, got {self.family!r}")
        if not self.numbers or any(n not in ARRANGEMENTS for n in self.numbers):
            raise UserError(f"numbers must be chosen from 1 to 4, got {self.numbers}")
        if self.weights and len(self.weights) != len(self.numbers):
            raise UserError(f"weights must have one entry per number {self.numbers}, got {self.weights}")
        if self.size < 16 or self.reference_size < 16:
            raise UserError(f"size and reference_size must be at least 16, got {self.size} and {self.reference_size}")
        for name in ("shape", "reference_shape"):
            if (shape := getattr(self, name)) is not None and min(shape) < 16:
                raise UserError(f"{name} must be a height and a width of at least 16 pixels, got {shape}")
        if self.references_per_subject < 1:
            raise UserError(f"references_per_subject must be at least 1, got {self.references_per_subject}")
        if not 0 <= self.shared_attributes < len(FAMILIES[self.family].attributes):
            raise UserError(
                f"shared_attributes must be in [0, {len(FAMILIES[self.family].attributes) - 1}], got {self.shared_attributes}"
            )

    @property
    def height_width(self) -> tuple[int, int]:
        """Of a scene, in pixels."""
        return self.shape or (self.size, self.size)

    @property
    def reference_height_width(self) -> tuple[int, int]:
        """Of a reference, in pixels."""
        return self.reference_shape or (self.reference_size, self.reference_size)


def check_shapes(shapes: Sequence[tuple[int, int]] | None, *, name: str = "shapes") -> None:
    """Raises ValueError unless these are sizes (height, width) in pixels, each once, or None."""
    if shapes is None:
        return
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes) or len(set(shapes)) != len(shapes):
        raise UserError(f"{name} must hold sizes (height, width) in pixels, each once, got {shapes}")


class Scenes(NamedTuple):
    """A batch of scenes; subjects are padded to the largest number m, absent ones have zero masks and identity -1.

    Shapes: images (b, 3, H, W) in [0, 1]; masks (b, m, H, W), the visible coverage of each subject; references (b, r, 3, h, w) in [0, 1],
    those of the first subject before those of the second; identities (b, m, a); boxes (b, m, 4) as left, top, right, bottom in pixels of the
    whole subject (occluded or not); number (b,); setting, time, arrangement (b,) as indices; poses as `draw` takes them, heights in
    pixels, light as a factor on colours, of the scene and of each reference.
    """

    images: Float[Tensor, "b 3 H W"]
    masks: Float[Tensor, "b m H W"]
    references: Float[Tensor, "b r 3 h w"]
    identities: Int[Tensor, "b m a"]
    boxes: Float[Tensor, "b m 4"]
    number: Int[Tensor, " b"]
    setting: Int[Tensor, " b"]
    time: Int[Tensor, " b"]
    arrangement: Int[Tensor, " b"]
    poses: Float[Tensor, "b m p"]
    heights: Float[Tensor, "b m"]
    light: Float[Tensor, "b 3"]
    reference_poses: Float[Tensor, "b r p"]
    reference_heights: Float[Tensor, "b r"]
    reference_light: Float[Tensor, "b r 3"]

    def captions(self, family: Family = PEOPLE) -> list[str]:
        """One caption per scene from the grammar."""
        rows = zip(
            self.number.tolist(), self.setting.tolist(), self.time.tolist(), self.arrangement.tolist(), strict=True
        )
        return [caption(n, s, t, a, family) for n, s, t, a in rows]


def caption(number: int, setting: int, time: int, arrangement: int, family: Family = PEOPLE) -> str:
    """One sentence of the grammar: number, arrangement, setting, time of day.

    >>> caption(2, 0, 1, 1)
    'two people far apart in the park at sunset'
    """
    noun = family.singular if number == 1 else family.plural
    place = f"on the {SETTINGS[setting]}" if SETTINGS[setting] in ("beach", "street") else f"in the {SETTINGS[setting]}"
    when = {"day": "by day", "sunset": "at sunset", "night": "at night"}[TIMES[time]]
    return f"{NUMBERS[number - 1]} {noun} {ARRANGEMENTS[number][arrangement]} {place} {when}"


def _uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _layout(
    number: Tensor, arrangement: Tensor, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Feet (x, y) as fractions of the scene's width and height, heights as fractions of its shorter side: three tensors (b, most).

    Subjects take the places in random order: the order of the references does not say who stands where.
    """
    b = len(number)
    n, kind = number[:, None], arrangement[:, None]
    absent = (torch.arange(most)[None] >= n) * 2.0
    slot = (torch.rand(b, most, generator=generator) + absent).argsort(1).argsort(1)
    jitter = _uniform(generator, b, most, low=-1.0)
    height = torch.where(
        n <= 2, _uniform(generator, b, most, low=0.56, high=0.76), _uniform(generator, b, most, low=0.42, high=0.52)
    )
    foot_y = _uniform(generator, b, most, low=0.86, high=0.97)
    one = 0.25 + 0.25 * kind + 0.06 * jitter
    apart = torch.where(kind == 1, 0.27, torch.where(kind == 0, 0.17, 0.135))
    two = (
        0.5
        + (2 * slot - 1) * apart
        + 0.03 * jitter
        + _uniform(generator, b, 1, low=-1.0) * torch.where(kind == 1, 0.03, 0.1)
    )
    behind = (n == 2) & (kind == 2)
    height = torch.where(behind, torch.where(slot == 0, 0.85, 1.0) * height, height)
    foot_y = torch.where(behind, torch.where(slot == 0, 0.80, 0.965), foot_y)
    row = (slot + 0.5) / n + 0.02 * jitter
    many = torch.where(kind == 0, row, 0.14 + 0.72 * (slot + 0.5) / n + 0.02 * jitter)
    deep = torch.where((n > 2) & (kind == 1), torch.where(slot % 2 == 0, 0.74, 0.97), foot_y)
    foot_x = torch.where(n == 1, one, torch.where(n == 2, two, many))
    return foot_x, torch.where(n > 2, deep, foot_y), height


def _background(setting: Tensor, time: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Sky and ground fill the picture, whatever its shape; the landmark is drawn in units of the shorter side, so that a sun stays round."""
    b, side = len(setting), min(height, width)
    sky = torch.tensor([_BACKDROPS[s][0] for s in SETTINGS])[setting] * torch.tensor([_SKIES[t] for t in TIMES])[time]
    indoor = (
        torch.tensor([_BACKDROPS[s][0] for s in SETTINGS])[setting] * torch.tensor([_LIGHTS[t] for t in TIMES])[time]
    )
    sky = torch.where((setting == SETTINGS.index("room"))[:, None], indoor, sky).clamp(0, 1)
    ground = (
        torch.tensor([_BACKDROPS[s][1] for s in SETTINGS])[setting] * torch.tensor([_LIGHTS[t] for t in TIMES])[time]
    )
    horizon = torch.tensor([_BACKDROPS[s][2] for s in SETTINGS])[setting] + _uniform(generator, b, low=-0.05, high=0.05)
    y = ((torch.arange(height) + 0.5) / height)[None, :, None]
    below = ((y - horizon[:, None, None]) * height + 0.5).clamp(0, 1)
    shade = 1 - 0.18 * (y - horizon[:, None, None]).abs()
    picture = torch.lerp(sky[:, :, None, None], ground[:, :, None, None], below[:, None]) * shade[:, None]
    # one landmark a setting: tree, sun over the sea, window, building, cactus, snowy hill
    place = _uniform(generator, b, low=0.1, high=0.9)[:, None, None] * (width / side)
    level = horizon[:, None, None] * (height / side)
    y = ((torch.arange(height) + 0.5) / side)[None, :, None]
    x = ((torch.arange(width) + 0.5) / side)[None, None, :]
    shape = (b, height, width)
    shapes = torch.stack(
        [
            torch.minimum(circle(x, y, place, level - 0.22, 0.13), box(x, y, place, level - 0.06, 0.02, 0.08)).expand(
                shape
            ),
            circle(x, y, place, level - 0.02, 0.11).maximum(y - level).expand(shape),
            box(x, y, place, 0.3, 0.11, 0.13).expand(shape),
            box(x, y, place, level - 0.2, 0.13, 0.22).maximum(y - level).expand(shape),
            torch.minimum(
                box(x, y, place, level - 0.05, 0.025, 0.14), box(x, y, place, level - 0.06, 0.08, 0.022)
            ).expand(shape),
            circle(x, y, place, level + 0.22, 0.33).maximum(y - level).expand(shape),
        ]
    )[setting, torch.arange(b)]
    colours = torch.tensor(
        [(0.20, 0.48, 0.22), (1.0, 0.92, 0.6), (0.72, 0.9, 1.0), (0.5, 0.34, 0.32), (0.3, 0.5, 0.28), (0.86, 0.9, 0.96)]
    )
    tint = colours[setting] * torch.tensor([_LIGHTS[t] for t in TIMES])[time]
    return picture.lerp(tint[:, :, None, None], (0.5 - shapes * side).clamp(0, 1)[:, None])


def _paste(
    canvas: Tensor, masks: Tensor, slot: int, rgb: Tensor, alpha: Tensor, left: Tensor, top: Tensor, rows: Tensor
) -> None:
    """Paints boxes (n, ., h, w) into canvases ``rows`` at integer corners; everything outside the canvas is cut."""
    h, w = alpha.shape[1:]
    height, width = canvas.shape[-2:]
    yy = top[:, None] + torch.arange(h)
    xx = left[:, None] + torch.arange(w)
    inside = ((yy >= 0) & (yy < height))[:, :, None] & ((xx >= 0) & (xx < width))[:, None, :]
    alpha = alpha * inside
    where = (rows[:, None, None], yy.clamp(0, height - 1)[:, :, None], xx.clamp(0, width - 1)[:, None, :])
    full = torch.zeros(len(canvas), height, width)
    full.index_put_(where, alpha, accumulate=True)
    painted = torch.zeros(len(canvas), height, width, 3)
    painted.index_put_(where, (rgb * alpha[:, None]).permute(0, 2, 3, 1), accumulate=True)
    canvas.mul_(1 - full[:, None]).add_(painted.permute(0, 3, 1, 2))
    masks.mul_(1 - full[:, None])
    masks[rows, slot] = full[rows]


def make_scenes(
    count: int,
    config: WorldConfig,
    generator: torch.Generator,
    *,
    identities: Int[Tensor, "b m a"] | None = None,
    setting: Int[Tensor, " b"] | None = None,
    time: Int[Tensor, " b"] | None = None,
    arrangement: Int[Tensor, " b"] | None = None,
) -> Scenes:
    """Draws ``count`` scenes with masks, references and captions.

    Args:
        count: Number of scenes.
        config: What is drawn.
        generator: Source of all randomness: equal generators give equal scenes.
        identities: Subjects to draw instead of random ones; then every scene has m of them.
        setting: Indices to use instead of random ones.
        time: The same.
        arrangement: The same.

    Returns:
        Scenes with subjects padded to the largest number.
    """
    family = FAMILIES[config.family]
    weights = torch.tensor(config.weights or [1.0] * len(config.numbers), dtype=torch.float32)
    pick = torch.multinomial(weights, count, replacement=True, generator=generator)
    number = torch.tensor(config.numbers)[pick] if identities is None else torch.full((count,), identities.shape[1])
    most = max(config.numbers) if identities is None else identities.shape[1]
    if identities is None:
        first = family.sample(count, config.split, generator)
        rows = [first]
        for _ in range(most - 1):
            shared = torch.randint(config.shared_attributes + 1, (count,), generator=generator)
            rows.append(family.sample(count, config.split, generator, like=first, shared=shared))
        identities = torch.stack(rows, 1)
    present = torch.arange(most)[None] < number[:, None]
    kinds = torch.tensor([len(ARRANGEMENTS[n]) for n in (1, 2, 3, 4)])[number - 1]
    drawn = (
        torch.rand(count, 3, generator=generator)
        * torch.stack([torch.full_like(kinds, 6), torch.full_like(kinds, 3), kinds], 1)
    ).long()
    setting = drawn[:, 0] if setting is None else setting
    time = drawn[:, 1] if time is None else time
    arrangement = drawn[:, 2] if arrangement is None else arrangement

    rows_of_scene, columns_of_scene = config.height_width
    side = min(config.height_width)
    fractions = _layout(number, arrangement, most, generator)
    foot_x, foot_y, height = (n * v for n, v in zip((columns_of_scene, rows_of_scene, side), fractions, strict=True))
    poses = _uniform(generator, count, most, POSE_SIZE, low=-1.0)
    light = torch.tensor([_LIGHTS[t] for t in TIMES])[time] * _uniform(generator, count, 1, low=0.88, high=1.08)
    images = _background(setting, time, rows_of_scene, columns_of_scene, generator)
    masks = torch.zeros(count, most, rows_of_scene, columns_of_scene)
    boxes = torch.zeros(count, most, 4)
    # a child of the tallest subject fits this box; narrower boxes for smaller crowds are not worth the code
    rows_px, columns_px = int(side * 0.92), int(side * 0.68)
    order = torch.argsort(foot_y + (~present) * 1e3, dim=1)
    for rank in range(most):
        slot = order[:, rank]
        chosen = torch.nonzero(present.gather(1, slot[:, None])[:, 0])[:, 0]
        for subject in range(most):
            here = chosen[slot[chosen] == subject]
            if not len(here):
                continue
            fx, fy, ht = foot_x[here, subject], foot_y[here, subject], height[here, subject]
            left = (fx - columns_px / 2).floor().long()
            top = (fy - rows_px + 2).floor().long()
            sprite = draw(
                family, identities[here, subject], poses[here, subject], fx - left, fy - top, ht, (rows_px, columns_px)
            )
            _paste(images, masks, subject, sprite.rgb * light[here][:, :, None, None], sprite.alpha, left, top, here)
            boxes[here, subject] = torch.stack([fx - 0.31 * ht, fy - 1.02 * ht, fx + 0.31 * ht, fy], 1)
    shown = identities.repeat_interleave(config.references_per_subject, 1)
    portraits = DrawnReferences(
        *(
            part.unflatten(0, shown.shape[:2])
            for part in draw_references(family, shown.flatten(0, 1), config.reference_height_width, generator)
        )
    )
    absent, given = ~present, present.repeat_interleave(config.references_per_subject, 1)
    return Scenes(
        images=images.clamp_(0, 1),
        masks=masks,
        references=portraits.images * given[:, :, None, None, None],
        identities=identities.masked_fill(absent[:, :, None], -1),
        boxes=boxes,
        number=number,
        setting=setting,
        time=time,
        arrangement=arrangement,
        poses=poses,
        heights=height * present,
        light=light,
        reference_poses=portraits.poses,
        reference_heights=portraits.heights * given,
        reference_light=portraits.light,
    )


class DrawnReferences(NamedTuple):
    """images (n, 3, h, w) in [0, 1]; poses (n, p); heights (n,) in pixels; light (n, 3), a factor on the person's colours."""

    images: Float[Tensor, "*n 3 h w"]
    poses: Float[Tensor, "*n p"]
    heights: Float[Tensor, "*n"]
    light: Float[Tensor, "*n 3"]


def make_references(
    family: Family, identities: Int[Tensor, "n a"], size: int, generator: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """The pictures of `draw_references`."""
    return draw_references(family, identities, (size, size), generator).images


def draw_references(
    family: Family, identities: Int[Tensor, "n a"], size: tuple[int, int], generator: torch.Generator
) -> DrawnReferences:
    """Portraits (n, 3, h, w) of a size (h, w) on plain grounds, each with a pose, a scale and a light of its own."""
    n, (rows, columns) = len(identities), size
    pose = _uniform(generator, n, POSE_SIZE, low=-1.0)
    height = min(rows, columns / 0.68) * _uniform(generator, n, low=0.74, high=0.86)  # a person is not cut at the sides
    foot_x = columns * _uniform(generator, n, low=0.46, high=0.54)
    foot_y = rows * _uniform(generator, n, low=0.96, high=1.0)
    sprite = draw(family, identities, pose, foot_x, foot_y, height, size)
    ground = _uniform(generator, n, 1, low=0.45, high=0.8) * (1 + _uniform(generator, n, 3, low=-0.06, high=0.06))
    light = _uniform(generator, n, 1, low=0.85, high=1.05) * (1 + _uniform(generator, n, 3, low=-0.04, high=0.04))
    picture = ground[:, :, None, None].lerp(sprite.rgb * light[:, :, None, None], sprite.alpha[:, None])
    return DrawnReferences(picture.clamp(0, 1), pose, height, light)
