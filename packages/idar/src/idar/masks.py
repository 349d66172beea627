"""Subject masks at token resolution, and normalisations of attention maps."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal, TypeGuard

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Normalization = Literal["max", "minmax", "share", "sum", "none"]
Fit = Literal["stretch", "pad", "crop"]
MAX_TOKENS = 2**24


def require_tensor(**values: object) -> None:
    """Refuses what is no dense tensor of real numbers.

    Raises:
        ValueError: Naming the argument.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__} (torch.as_tensor makes one)")
        if value.is_complex() or value.layout != torch.strided or value.is_meta:
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise ValueError(f"{name} must be a dense tensor of real numbers with values, got {kind}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, NumPy's too; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Refuses what is no number, NaN, or outside [low, high].

    Raises:
        ValueError: Naming it.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not low <= float(value) <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {one_line(value)}")


def one_line(value: object) -> str:
    """How a sentence shows what came: on one line, and not all of it where it is long."""
    return " ".join(repr(value).split())[:200]


def check_size(size: tuple[int, int]) -> None:
    """Refuses a picture's height and width that are no two finite numbers of at least 1.

    Raises:
        ValueError: They are none.
    """
    pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    if not pair or not all(isinstance(n, numbers.Real) and 1 <= n < math.inf for n in size):
        raise ValueError(f"size must be positive, two finite numbers (height, width), got {one_line(size)}")


def check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Token rows and columns, as whole numbers of at least 1.

    Raises:
        ValueError: They are none.

    >>> check_grid((2, 3))
    (2, 3)
    """
    good = isinstance(grid, Sequence) and not isinstance(grid, str) and len(grid) == 2
    if not good or not all(is_whole(n) and n >= 1 for n in grid):
        raise ValueError(f"grid must be positive, two whole numbers (rows, columns), got {one_line(grid)}")
    if grid[0] * grid[1] > MAX_TOKENS:
        raise ValueError(f"grid must be positive and of at most {MAX_TOKENS:,} tokens, got {grid!r}"[:300])
    return int(grid[0]), int(grid[1])


def token_masks(
    masks: Float[Tensor, "b s H W"] | Bool[Tensor, "b s H W"],
    grid: tuple[int, int],
    *,
    fit: Fit = "stretch",
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Float[Tensor, "b s n"]:
    """Share of each token's area that a subject covers: exact area pooling to ``grid`` (rows, columns), rows first.

        out_rc = sum_yx A_ry M_yx B_cx,   A_ry = |[y, y+1) intersected with token row r| / |token row r|, B likewise

    Any picture size works, also where the grid does not divide it.

    Args:
        masks: Masks of s subjects in [0, 1], at the picture's resolution; they may overlap.
        grid: Token rows and columns of the model's canvas.
        fit: How the picture came onto the canvas where their aspect ratios differ: "stretch" scaled each side on its own, "pad" scaled it
            to fit and centred it (the rest belongs to nobody), "crop" scaled it to cover and cut what stands out.
        padding: Pixels (left, top, right, bottom) that were added to the picture before that, at the masks' resolution.

    Returns:
        (b, s, rows * columns) in fp32.

    Raises:
        ValueError: Masks are not 4-D or leave [0, 1], the grid or the padding is not positive, or fit is unknown.

    >>> token_masks(torch.ones(1, 1, 4, 6), (2, 3)).tolist()
    [[[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]]
    >>> token_masks(torch.ones(1, 1, 2, 4), (4, 4), fit="pad").unflatten(2, (4, 4))[0, 0, :, 0].tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    require_tensor(masks=masks)
    grid = check_grid(grid)
    if masks.dim() != 4 or min(masks.shape[2:]) < 1:
        raise ValueError(f"masks must be (b, s, H, W), real, and grid positive, got {tuple(masks.shape)} and {grid}")
    masks = masks.float()
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError("masks must lie in [0, 1], got values outside or NaN")
    four = isinstance(padding, Sequence) and len(padding) == 4 and all(isinstance(p, numbers.Real) for p in padding)
    if not four or not all(0 <= p < math.inf for p in padding):
        raise ValueError(
            f"padding must be four numbers (left, top, right, bottom) of at least 0, got {one_line(padding)}"
        )
    left, top, right, bottom = padding
    height, width = masks.shape[2] + top + bottom, masks.shape[3] + left + right
    scale_y, scale_x = height / grid[0], width / grid[1]  # pixels per token
    if fit == "pad":
        scale_y = scale_x = max(scale_y, scale_x)
    elif fit == "crop":
        scale_y = scale_x = min(scale_y, scale_x)
    elif fit != "stretch":
        raise ValueError(f"fit must be 'stretch', 'pad' or 'crop', got {one_line(fit)}")
    rows = _overlaps(masks.shape[2], grid[0], scale_y, (height - grid[0] * scale_y) / 2 - top).to(masks.device)
    columns = _overlaps(masks.shape[3], grid[1], scale_x, (width - grid[1] * scale_x) / 2 - left).to(masks.device)
    return torch.einsum("ry,bsyx,cx->bsrc", rows, masks, columns).flatten(2).clamp_(0, 1)


def owner_masks(coverage: Float[Tensor, "b s n"], *, threshold: float = 0.15) -> Float[Tensor, "b s n"]:
    """Each token goes to the subject that covers most of it, if that is at least ``threshold``; 1 for its owner, else 0.

        owner(j) = argmax_i C_ij   where max_i C_ij >= threshold, else nobody

    Args:
        coverage: Share of each token that each subject covers (`token_masks`), or any score to be compared.
        threshold: Tokens that are covered less belong to nobody; positive.

    Raises:
        ValueError: The threshold is not positive, or coverage is not finite.

    >>> owner_masks(torch.tensor([[[0.9, 0.3, 0.1], [0.1, 0.4, 0.0]]])).tolist()
    [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    require_tensor(coverage=coverage)
    if coverage.dim() != 3 or not coverage.shape[1] or not bool(torch.isfinite(coverage).all()):
        raise ValueError(f"coverage must be finite and (b, s, n), got {tuple(coverage.shape)}")
    if not isinstance(threshold, numbers.Real) or isinstance(threshold, bool) or not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive and finite, got {one_line(threshold)}")
    best = coverage.max(1, keepdim=True)
    ones = torch.zeros_like(coverage, dtype=torch.float32).scatter_(1, best.indices, 1.0)
    return ones * (best.values >= float(threshold))


def box_masks(
    boxes: Float[Tensor, "b s 4"],
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    margin: float = 2.0,
) -> Float[Tensor, "b s n"]:
    """Tokens of each subject from its box: those whose centre lies in the box; where boxes overlap, the nearer one's.

        score_ij = 1 - d_ij / 2 inside box i, else 0,   d_ij = max(|x_j - cx_i| / w_i, |y_j - cy_i| / h_i) * 2

    Args:
        boxes: (left, top, right, bottom) in pixels of the picture; NaN where a subject was not found (it gets no token).
        grid: Token rows and columns of the picture.
        size: Height and width of the picture in pixels.
        margin: Pixels added on each side of a box.

    Returns:
        (b, s, rows * columns), 1 for the owner of a token, else 0.

    Raises:
        ValueError: Shapes or sizes do not fit, or a box ends before it begins.

    >>> box_masks(torch.tensor([[[0.0, 0.0, 8.0, 16.0]]]), (2, 2), (16, 16), margin=0.0).tolist()
    [[[1.0, 0.0, 1.0, 0.0]]]
    """
    require_tensor(boxes=boxes)
    grid = check_grid(grid)
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be (b, s, 4), got {tuple(boxes.shape)}")
    if bool(torch.isinf(boxes).any()):
        raise ValueError("boxes must be finite, or NaN for a subject that was not found, got infinity")
    check_size(size)
    check_number("margin", margin, 0, 1e9)
    left, top, right, bottom = boxes.float().unbind(2)
    if bool((right < left).any() or (bottom < top).any()):
        raise ValueError("boxes must be (left, top, right, bottom), got one that ends before it begins")
    y = (torch.arange(grid[0], device=boxes.device) + 0.5) * size[0] / grid[0]
    x = (torch.arange(grid[1], device=boxes.device) + 0.5) * size[1] / grid[1]
    y, x = (part.reshape(1, 1, -1) for part in torch.meshgrid(y, x, indexing="ij"))

    def away(at: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Distance to the middle, in half widths."""
        half = ((high - low) / 2 + margin).clamp_min(1e-6)[..., None]
        return (at - ((low + high) / 2)[..., None]).abs() / half

    distance = torch.maximum(away(x, left, right), away(y, top, bottom))
    score = torch.where(distance <= 1, 1 - distance / 2, torch.zeros_like(distance))
    return owner_masks(score.nan_to_num(0.0), threshold=1e-6)


def map_boxes(
    maps: Float[Tensor, "b s n"], grid: tuple[int, int], size: tuple[int, int], *, tail: float = 0.05
) -> Float[Tensor, "b s 4"]:
    """A box for each subject from attention maps alone: where its tokens are, without the thin ends.

        r_ij = m_ij / mean_j m_ij,   i owns j if i = argmax_k r_kj and sum_k m_kj > mean over j of it

    The box holds all but ``tail`` of the mass of r over the owned tokens, on each of its four sides.

    Args:
        maps: How much each image token looks at each reference ("image_to_reference").
        grid: Token rows and columns.
        size: Height and width of the picture in pixels.
        tail: Share of the mass left out on each side, in [0, 0.5).

    Returns:
        (left, top, right, bottom) in pixels; NaN for a subject that owns no token.

    Raises:
        ValueError: Sizes do not fit, or maps are not finite and at least 0.

    >>> map_boxes(torch.tensor([[[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]]]), (1, 4), (8, 32)).tolist()
    [[[0.0, 0.0, 16.0, 8.0], [16.0, 0.0, 24.0, 8.0]]]
    """
    require_tensor(maps=maps)
    grid = check_grid(grid)
    if maps.dim() != 3 or maps.shape[2] != grid[0] * grid[1]:
        raise ValueError(f"maps must be (b, s, {grid[0] * grid[1]}) for this grid, got {tuple(maps.shape)}")
    if not bool((torch.isfinite(maps) & (maps >= 0)).all()):
        raise ValueError("maps must be finite and at least 0, got values outside or NaN")
    check_size(size)
    if not isinstance(tail, numbers.Real) or not 0 <= tail < 0.5:
        raise ValueError(f"tail must be in [0, 0.5), got {one_line(tail)}")
    maps = maps if maps.dtype == torch.float64 else maps.float()
    relative = maps / maps.mean(-1, keepdim=True).clamp_min(1e-12)
    total = maps.sum(1, keepdim=True)
    owner = torch.zeros_like(relative).scatter_(1, relative.argmax(1, keepdim=True), 1.0)
    mass = (relative * owner * (total > total.mean(-1, keepdim=True))).reshape(*maps.shape[:2], *grid)
    top, bottom = _middle(mass.sum(3), size[0] / grid[0], tail)
    left, right = _middle(mass.sum(2), size[1] / grid[1], tail)
    return torch.stack([left, top, right, bottom], -1)


def _middle(mass: Float[Tensor, "b s k"], pixels: float, tail: float) -> tuple[Tensor, Tensor]:
    """Pixels between which all but ``tail`` of the mass on each side lies; NaN where there is none."""
    share = mass.cumsum(-1) / mass.sum(-1, keepdim=True)
    known = mass.sum(-1) > 0
    low, high = (share <= tail).sum(-1) * pixels, ((share < 1 - tail).sum(-1) + 1) * pixels
    return torch.where(known, low, torch.nan), torch.where(known, high, torch.nan)


def _overlaps(pixels: int, tokens: int, scale: float, start: float) -> Float[Tensor, "tokens pixels"]:
    """Share of token ``[start + t * scale, start + (t + 1) * scale)`` that pixel ``[p, p + 1)`` fills."""
    edges = start + scale * torch.arange(tokens + 1, dtype=torch.float64)
    position = torch.arange(pixels, dtype=torch.float64)
    stop = torch.minimum(edges[1:, None], position + 1)
    begin = torch.maximum(edges[:-1, None], position)
    return ((stop - begin).clamp_(min=0) / scale).float()


def normalize_maps(
    maps: Float[Tensor, "b s n"], mode: Normalization = "max", *, eps: float = 1e-8
) -> Float[Tensor, "b s n"]:
    """Brings maps to [0, 1].

    "max": ``m / max_j m``; "minmax": ``(m - min) / (max - min)``; "share": ``m_i / sum over subjects of m``, so that the subjects
    compete for every token; "sum": ``m / sum_j m``; "none": unchanged. A map that is zero (constant, for "minmax") becomes zero.

    Half precision is divided in fp32: it has no number as small as eps.

    Raises:
        ValueError: The mode is unknown, maps are below 0, or eps is not in [0, 1].

    >>> normalize_maps(torch.tensor([[[1.0, 4.0]], ]), "max").tolist()
    [[[0.25, 1.0]]]
    """
    require_tensor(maps=maps)
    check_number("eps", eps, 0, 1)
    if maps.dim() != 3 or not maps.shape[-1]:
        raise ValueError(f"maps must be (b, s, n) of at least one token, got {tuple(maps.shape)}")
    if not bool((maps.detach() >= 0).all()):
        raise ValueError(f"maps must be at least 0, as attention is, got {float(maps.detach().min()):g}")
    if maps.dtype in (torch.float16, torch.bfloat16):
        return normalize_maps(maps.float(), mode, eps=eps).to(maps.dtype)
    if mode == "max":
        return maps / maps.amax(-1, keepdim=True).clamp_min(eps)
    if mode == "minmax":
        low = maps.amin(-1, keepdim=True)
        return (maps - low) / (maps.amax(-1, keepdim=True) - low).clamp_min(eps)
    if mode == "share":
        return maps / maps.sum(1, keepdim=True).clamp_min(eps)
    if mode == "sum":
        return maps / maps.sum(-1, keepdim=True).clamp_min(eps)
    if mode == "none":
        return maps
    raise ValueError(f"mode must be 'max', 'minmax', 'share', 'sum' or 'none', got {one_line(mode)}")
