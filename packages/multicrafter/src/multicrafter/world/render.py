"""Draws subjects of the tiny world from signed distances, vectorised over subjects.

A subject lives in its own units: its height is 1, x to the right, y down, the top of the head (or of the object) near
y = 0 and the feet at (0, 1). A shape is a signed distance in these units (negative inside); coverage is
``clamp(1/2 - distance * height_in_pixels, 0, 1)``: one pixel of anti-aliasing. Shapes are painted back to front.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicrafter.world.attributes import COLOURS, PEOPLE, SKINS, Family

ABSENT = -9.0
POSE_SIZE = 5  # lean, left arm, right arm, head turn, leg spread; each in [-1, 1]


class Sprite(NamedTuple):
    """Subjects drawn in boxes: straight colours ``rgb`` (n, 3, h, w) in [0, 1] and coverage ``alpha`` (n, h, w)."""

    rgb: Float[Tensor, "n 3 h w"]
    alpha: Float[Tensor, "n h w"]


def _palette(table: dict[str, tuple[float, float, float]], index: Tensor) -> Tensor:
    return torch.tensor(list(table.values()))[index]


def _column(values: Tensor | list[float], index: Tensor | None = None) -> Tensor:
    table = torch.as_tensor(values, dtype=torch.float32)
    return (table if index is None else table[index])[:, None, None]


def circle(x: Tensor, y: Tensor, cx: Tensor | float, cy: Tensor | float, radius: Tensor | float) -> Tensor:
    """Signed distance to a disc."""
    return torch.hypot(x - cx, y - cy) - radius


def box(x: Tensor, y: Tensor, cx: Tensor | float, cy: Tensor | float, hx: Tensor | float, hy: Tensor | float) -> Tensor:
    """Signed (Chebyshev) distance to an axis-aligned box of half sizes hx, hy."""
    return torch.maximum((x - cx).abs_() - hx, (y - cy).abs_() - hy)


def capsule(x: Tensor, y: Tensor, ax: Tensor, ay: float, bx: Tensor, by: Tensor, radius: float) -> Tensor:
    """Signed distance to a thick line from a to b."""
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp_(0, 1)
    return torch.hypot(x - ax - along * dx, y - ay - along * dy) - radius


class _Canvas:
    """Paints shapes over each other in one set of boxes."""

    def __init__(self, shape: torch.Size, height: Tensor) -> None:
        n, h, w = shape
        self.rgb = torch.zeros(n, 3, h, w)
        self.alpha = torch.zeros(n, h, w)
        self.height = height

    def paint(self, colour: Tensor, distance: Tensor) -> None:
        cover = distance.mul(self.height).neg_().add_(0.5).clamp_(0, 1)
        self.rgb.lerp_(colour[:, :, None, None], cover[:, None])
        self.alpha.add_(cover * (1 - self.alpha))


def draw(
    family: Family,
    identities: Int[Tensor, "n a"],
    pose: Float[Tensor, "n p"],
    foot_x: Float[Tensor, " n"],
    foot_y: Float[Tensor, " n"],
    height: Float[Tensor, " n"],
    size: tuple[int, int],
) -> Sprite:
    """Draws ``n`` subjects, each in a box of its own.

    Args:
        family: PEOPLE or OBJECTS.
        identities: Category indices.
        pose: In [-1, 1]: lean, left arm, right arm, head turn, leg spread.
        foot_x: Horizontal position of the feet in pixels of the box.
        foot_y: Vertical position of the feet in pixels of the box.
        height: Height of a subject in pixels (hat not counted).
        size: Rows and columns of a box.

    Returns:
        Colours and coverage.
    """
    rows, columns = size
    px = torch.arange(columns, dtype=torch.float32) + 0.5
    py = torch.arange(rows, dtype=torch.float32) + 0.5
    x = (px[None, None, :] - foot_x[:, None, None]) / height[:, None, None]
    y = (py[None, :, None] - foot_y[:, None, None]) / height[:, None, None]
    angle = (0.14 * pose[:, 0])[:, None, None]
    x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y + 1
    canvas = _Canvas(x.shape, height[:, None, None])
    (_paint_people if family is PEOPLE else _paint_objects)(canvas, x, y, identities, pose)
    rgb = canvas.rgb / canvas.alpha[:, None].clamp_min(1e-3)
    return Sprite(rgb.clamp_(0, 1), canvas.alpha)


def _paint_people(canvas: _Canvas, x: Tensor, y: Tensor, identities: Tensor, pose: Tensor) -> None:
    skin_id, hair_id, style, shirt_id, trousers_id, hat, hat_id, glasses = identities.unbind(1)
    skin, hair = _palette(SKINS, skin_id), _palette(COLOURS, hair_id)
    shirt, trousers, hat_colour = (_palette(COLOURS, i) for i in (shirt_id, trousers_id, hat_id))
    black = torch.tensor([0.04, 0.04, 0.05]).expand(len(identities), 3)
    _, left, right, turn, spread = (p[:, None, None] for p in pose.unbind(1))
    cy, face = 0.27, 0.045 * turn

    # hair behind the head: afro, long strands, pigtails
    side = x.abs()
    back = circle(x, y, 0.0, cy - 0.02, _column([ABSENT, ABSENT, 0.315, ABSENT], style))
    back = torch.minimum(back, box(x, y, 0.0, cy + 0.13, _column([ABSENT, 0.255, ABSENT, ABSENT], style), 0.17))
    back = torch.minimum(back, circle(side, y, 0.29, cy + 0.05, _column([ABSENT, ABSENT, ABSENT, 0.105], style)))
    canvas.paint(hair, back)
    canvas.paint(trousers, box(side, y, 0.085 + 0.03 * spread, 0.88, 0.068, 0.13))
    for sign, arm in ((-1.0, left), (1.0, right)):
        bend = 0.5 + 0.75 * arm  # radians from hanging straight down
        ax = torch.full_like(arm, sign * 0.15)
        canvas.paint(shirt, capsule(x, y, ax, 0.55, ax + sign * 0.2 * bend.sin(), 0.55 + 0.2 * bend.cos(), 0.055))
    canvas.paint(shirt, box(x, y, 0.0, 0.635, 0.165, 0.15))
    head = circle(x, y, 0.0, cy, 0.225)
    canvas.paint(skin, head)
    canvas.paint(hair, torch.maximum(head - 0.015, y - (cy - 0.085)))
    canvas.paint(black, circle((x - face).abs(), y, 0.085, cy + 0.02, 0.032))
    canvas.paint(black, box(x, y, face, cy + 0.125, 0.055, 0.014))
    band = _palette({"none": COLOURS["black"], "sunglasses": (0.03, 0.03, 0.03), "goggles": (1.0, 0.45, 0.05)}, glasses)
    canvas.paint(
        band, box(x, y, face, cy + 0.02, _column([ABSENT, 0.165, 0.2], glasses), _column([0.0, 0.05, 0.062], glasses))
    )
    # hats: cap (half disc and visor), top hat (tall box and brim), cone
    top = torch.maximum(circle(x, y, 0.0, cy, _column([ABSENT, 0.25, ABSENT, ABSENT], hat)), y - (cy - 0.1))
    top = torch.minimum(top, box(x, y, 0.14, cy - 0.105, _column([ABSENT, 0.2, ABSENT, ABSENT], hat), 0.026))
    top = torch.minimum(top, box(x, y, 0.0, cy - 0.26, _column([ABSENT, ABSENT, 0.16, ABSENT], hat), 0.14))
    top = torch.minimum(top, box(x, y, 0.0, cy - 0.115, _column([ABSENT, ABSENT, 0.285, ABSENT], hat), 0.03))
    slope = side * 0.86 + (cy - 0.1 - y) * 0.5 - _column([ABSENT, ABSENT, ABSENT, 0.185], hat)
    top = torch.minimum(top, torch.maximum(slope, y - (cy - 0.1)))
    canvas.paint(hat_colour, top)


def _paint_objects(canvas: _Canvas, x: Tensor, y: Tensor, identities: Tensor, pose: Tensor) -> None:
    shape, colour_id, pattern, pattern_id, handle, lid, lid_id, stand_id = identities.unbind(1)
    colour, second, lid_colour, stand = (_palette(COLOURS, i) for i in (colour_id, pattern_id, lid_id, stand_id))
    side = x.abs()
    swing = (0.03 * pose[:, 3])[:, None, None]
    canvas.paint(stand, box(x, y, 0.0, 0.94, 0.3, 0.06))
    ring = circle(side, y, 0.3, 0.55 + swing, _column([ABSENT, 0.14, 0.14], handle))
    ring = torch.maximum(ring, -circle(side, y, 0.3, 0.55 + swing, 0.075))
    only = _column([ABSENT, 0.0, ABSENT], handle)
    canvas.paint(colour, torch.where(only == 0, torch.maximum(ring, -x), ring))
    body = box(x, y, 0.0, 0.58, _column([0.27, ABSENT, ABSENT, ABSENT], shape), 0.31)
    bottle = torch.minimum(box(x, y, 0.0, 0.66, 0.22, 0.23), box(x, y, 0.0, 0.36, 0.1, 0.12))
    body = torch.minimum(
        body, torch.where(_column([0.0, 1.0, 0.0, 0.0], shape) > 0, bottle, torch.full_like(bottle, 9.0))
    )
    body = torch.minimum(body, box(x, y, 0.0, 0.62, _column([ABSENT, ABSENT, 0.34, ABSENT], shape), 0.26))
    body = torch.minimum(body, circle(x, y, 0.0, 0.58, _column([ABSENT, ABSENT, ABSENT, 0.32], shape)))
    canvas.paint(colour, body)
    stripes = (((x + swing) / 0.16) % 1 - 0.5).abs() * 0.16 - 0.04
    decor = torch.where(_column([0.0, 1.0, 0.0, 0.0], pattern) > 0, stripes, torch.full_like(stripes, 9.0))
    decor = torch.minimum(decor, box(x, y, 0.0, 0.62 + swing, _column([ABSENT, ABSENT, 1.0, ABSENT], pattern), 0.075))
    decor = torch.minimum(decor, circle(x, y, swing, 0.6, _column([ABSENT, ABSENT, ABSENT, 0.13], pattern)))
    canvas.paint(second, torch.maximum(decor, body))
    rim = _column([0.27, 0.25, 0.36, 0.29], shape)
    cover = box(x, y, 0.0, rim, _column([ABSENT, 0.24, ABSENT], lid), 0.05)
    dome = torch.maximum(circle(x, y, 0.0, rim + 0.04, _column([ABSENT, ABSENT, 0.2], lid)), y - rim - 0.04)
    canvas.paint(lid_colour, torch.minimum(cover, dome))
