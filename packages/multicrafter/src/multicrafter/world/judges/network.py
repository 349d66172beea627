"""The convolutional network behind the tiny world's judges: a heat map of subjects' centres and features at its peaks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicrafter import renamed

renamed(__name__, {"Found": "Detections"})

STRIDE = 4


PICTURE_SIDE, REFERENCE_SIDE, LONGEST = 64, 32, 1024
"""Shorter sides, in pixels, of the pictures and references that the judges were trained on, and the longest side they are shown."""


def shown_at(
    pictures: Float[Tensor, "b 3 H W"], side: int = PICTURE_SIDE
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "4"]]:
    """Pictures scaled to a shorter side, and what boxes in them are to be divided by. The judges know people of one size only.

    On drawn scenes of 32 x 96 to 512 x 512 pixels the reader of truth then reads .92 to .96 of the attributes, and without .00 to .96.
    """
    height, width = pictures.shape[-2:]
    factor = min(side / min(height, width), max(LONGEST / max(height, width), 1.0))
    size = [max(STRIDE, round(extent * factor)) for extent in (height, width)]
    if size != [height, width]:
        pictures = nn.functional.interpolate(pictures, size, mode="bilinear", antialias=True).clamp(0, 1)
    return pictures, torch.tensor([size[1] / width, size[0] / height]).repeat(2)


class Maps(NamedTuple):
    """heat (b, h, w) logits of centres, boxes (b, 4, h, w) offsets in cells, features (b, c, h, w), scene (b, g) logits of the whole picture."""

    heat: Float[Tensor, "b h w"]
    boxes: Float[Tensor, "b 4 h w"]
    features: Float[Tensor, "b c h w"]
    scene: Float[Tensor, "b g"]


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.second(torch.nn.functional.silu(self.first(self.norm(x))))
        return found


class SubjectNetwork(nn.Module):
    """Pictures (b, 3, H, W) in [0, 1] -> `Maps` at a quarter of the resolution.

    Args:
        width: Channels.
        dilations: One residual block each.
        num_features: Channels of the features at a peak: attribute logits, or an embedding.
        num_scene: Logits of the whole picture.
    """

    def __init__(self, width: int, dilations: tuple[int, ...], num_features: int, num_scene: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(*[_Residual(width, d) for d in dilations], nn.GroupNorm(8, width), nn.SiLU())
        self.centre = nn.Conv2d(width, 5, 1)
        self.features = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.SiLU(), nn.Conv2d(2 * width, num_features, 1)
        )
        self.scene = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, num_scene))

    def forward(self, pictures: Tensor) -> Maps:
        """See the class."""
        x = self.blocks(self.stem(pictures * 2 - 1))
        centre = self.centre(x)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return Maps(centre[:, 0], centre[:, 1:], self.features(x), self.scene(pooled))


class Detections(NamedTuple):
    """Subjects found in a batch: picture (n,), boxes (n, 4) in pixels, scores (n,), features (n, c)."""

    picture: Tensor
    boxes: Tensor
    scores: Tensor
    features: Tensor


def find(maps: Maps, *, threshold: float = 0.5) -> Detections:
    """Peaks of the heat map above ``threshold`` (probability) that are the largest in their 3x3 neighbourhood.

    An edge that a network puts on the wrong side changes places with the opposite one, so that no box ends before it begins.
    """
    heat = maps.heat.float().sigmoid()
    peak = heat == nn.functional.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0]
    picture, row, column = torch.where(peak & (heat > threshold))
    offsets = maps.boxes.float()[picture, :, row, column]
    cells = torch.stack([column, row, column, row], 1) + 0.5
    one, other = ((cells + offsets) * STRIDE).split(2, 1)
    boxes = torch.cat([torch.minimum(one, other), torch.maximum(one, other)], 1)
    return Detections(picture, boxes, heat[picture, row, column], maps.features.float()[picture, :, row, column])


def centre_cells(boxes: Float[Tensor, "b m 4"], size: int) -> tuple[Tensor, Tensor]:
    """Row and column of the cell that holds each box's centre, (b, m) each."""
    cells = size // STRIDE
    column = ((boxes[..., 0] + boxes[..., 2]) / 2 / STRIDE).long().clamp(0, cells - 1)
    row = ((boxes[..., 1] + boxes[..., 3]) / 2 / STRIDE).long().clamp(0, cells - 1)
    return row, column


def detection_loss(maps: Maps, boxes: Float[Tensor, "b m 4"], present: Tensor, size: int) -> Tensor:
    """Focal loss of the heat map against a small Gaussian at each centre (CenterNet, arXiv 1904.07850, Eq. 1) + L1 of the boxes."""
    cells = maps.heat.shape[-1]
    grid = torch.arange(cells, dtype=torch.float32) + 0.5
    cx, cy = (boxes[..., 0] + boxes[..., 2]) / 2 / STRIDE, (boxes[..., 1] + boxes[..., 3]) / 2 / STRIDE
    distance = (grid[None, None, None, :] - cx[..., None, None]) ** 2 + (
        grid[None, None, :, None] - cy[..., None, None]
    ) ** 2
    target = ((-distance / 1.5).exp() * present[..., None, None]).amax(1)
    row, column = centre_cells(boxes, size)
    batch = torch.arange(len(boxes))[:, None].expand_as(row)
    exact = torch.zeros_like(target, dtype=torch.bool)
    exact[batch[present], row[present], column[present]] = True
    heat = maps.heat.float()
    p = heat.sigmoid()
    log_p, log_q = nn.functional.logsigmoid(heat), nn.functional.logsigmoid(-heat)
    focal = torch.where(
        exact, -((1 - p) ** 2) * log_p, -((1 - target) ** 4) * p**2 * log_q
    ).sum() / exact.sum().clamp_min(1)
    want = boxes / STRIDE - (torch.stack([column, row, column, row], -1) + 0.5)
    got = maps.boxes.float()[batch, :, row, column]
    return focal + 0.1 * (got - want).abs().sum(-1)[present].mean()
