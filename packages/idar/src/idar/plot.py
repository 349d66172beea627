"""Pictures of where subjects look; needs matplotlib (``pip install "idar[plot]"``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from idar.masks import Normalization, normalize_maps
from idar.metrics import AttentionProfile

TITLES = {
    "overlap": "overlap of the subjects' maps",
    "leakage": "leakage onto other subjects",
    "map_iou": "IoU of map and mask",
    "peak_in_mask": "peak inside the mask",
}


def require_matplotlib() -> Any:
    """Matplotlib's figure class.

    Raises:
        ImportError: matplotlib is missing; the message names the pip line.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "idar[plot]"') from error
    return Figure


def _figure(width: float, height: float) -> Any:
    return require_matplotlib()(figsize=(width, height), layout="constrained")


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(figure: Any, path: str | Path) -> Path:
    """Writes a figure as PNG (or what the suffix says), whole or not at all."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.unfinished")
    figure.savefig(unfinished, dpi=140, format=target.suffix.lstrip(".") or "png")
    os.replace(unfinished, target)
    return target


def plot_maps(
    picture: Float[Tensor, "3 H W"],
    maps: Float[Tensor, "s n"],
    grid: tuple[int, int],
    *,
    masks: Float[Tensor, "s n"] | None = None,
    references: Sequence[Float[Tensor, "3 h w"]] | None = None,
    names: Sequence[str] | None = None,
    normalization: Normalization = "max",
    path: str | Path | None = None,
) -> Any:
    """Heat maps over the picture, one column a subject (after MultiCrafter, arXiv 2509.21953, Fig. 2).

    Args:
        picture: The generated or target picture in [0, 1].
        maps: One map per subject (`subject_attention`, averaged over what you like).
        grid: Token rows and columns, with rows * columns = n.
        masks: Where the subjects are (`token_masks`): drawn as outlines.
        references: The references' pictures, shown above.
        names: One per subject.
        normalization: How maps are brought to [0, 1], see `normalize_maps`.
        path: Write the figure there, too.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: Numbers or sizes do not fit.
        ImportError: matplotlib is missing; the message names the pip line.
    """
    count, tokens = maps.shape
    if tokens != grid[0] * grid[1]:
        raise ValueError(f"grid must hold the maps' {tokens} tokens, got {grid[0]} x {grid[1]}")
    for what, given in (("masks", masks), ("references", references), ("names", names)):
        if given is not None and len(given) != count:
            raise ValueError(f"{what} must be one per subject, got {len(given)} for {count}")
    names = names or [f"subject {chr(65 + i)}" for i in range(count)]
    height, width = picture.shape[1:]
    rows = 1 if references is None else 2
    tall = 2.6 * min(2.0, max(0.5, height / width))
    figure = _figure(2.6 * (count + 1), tall + 0.4 + (1.5 if rows == 2 else 0))
    axes = figure.subplots(
        rows, count + 1, squeeze=False, height_ratios=[1.0, tall / 1.3][-rows:] if rows == 2 else [1]
    )
    shown = picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)
    heat = normalize_maps(maps[None].detach().float().cpu(), normalization)[0].view(count, *grid)
    grey = shown.mean(-1)
    extent = (0, width, height, 0)
    for column in range(count + 1):
        for row in axes[:, column]:
            _bare(row)
    axes[-1, 0].imshow(shown.numpy(), extent=extent)
    axes[-1, 0].set_title("picture", fontsize=9)
    drawn = None
    for i in range(count):
        if references is not None:
            reference = references[i].detach().float().cpu().clamp(0, 1).permute(1, 2, 0)
            axes[0, i + 1].imshow(reference.numpy())
        below = axes[-1, i + 1]
        below.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
        drawn = below.imshow(
            heat[i].numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.65, extent=extent, interpolation="bilinear"
        )
        if masks is not None:
            inside = (masks[i].detach().float().cpu() >= 0.5).float().view(grid)
            fine = inside.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
            if 0 < fine.mean() < 1:
                below.contour(fine, levels=[0.5], colors="cyan", linewidths=1.2, extent=(0, width, 0, height))
        below.set_title(names[i], fontsize=9)
        below.set_xlim(0, width)
        below.set_ylim(height, 0)
    bar = figure.colorbar(drawn, ax=list(axes.flat), shrink=0.7, aspect=15)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the maximum" if normalization == "max" else f"attention ({normalization})", fontsize=7)
    if path is not None:
        save(figure, path)
    return figure


def plot_blocks(
    maps: Float[Tensor, "k t n"],
    grid: tuple[int, int],
    *,
    blocks: Sequence[str],
    sigmas: Sequence[float],
    title: str = "",
    path: str | Path | None = None,
) -> Any:
    """One subject's maps: a row per block, a column per noise level, each divided by its maximum.

    Raises:
        ValueError: Sizes do not fit.
        ImportError: matplotlib is missing; the message names the pip line.
    """
    if maps.shape != (len(blocks), len(sigmas), grid[0] * grid[1]):
        want = (len(blocks), len(sigmas), grid[0] * grid[1])
        raise ValueError(f"maps must be (k, t, n) = {want} for these blocks, sigmas and grid, got {tuple(maps.shape)}")
    k, t = maps.shape[:2]
    gap = max(1, grid[0] // 12)
    tiles = normalize_maps(maps.detach().float().cpu(), "max").view(*maps.shape[:2], *grid)
    canvas = torch.full((k * (grid[0] + gap) - gap, t * (grid[1] + gap) - gap), torch.nan)
    for i in range(k):
        for j in range(t):
            y, x = i * (grid[0] + gap), j * (grid[1] + gap)
            canvas[y : y + grid[0], x : x + grid[1]] = tiles[i, j]
    figure = _figure(min(16.0, 1.6 + 1.0 * t), min(24.0, 0.7 + 1.0 * k * grid[0] / grid[1]))
    axes = figure.subplots()
    axes.imshow(canvas.numpy(), cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
    _bare(axes)
    axes.set_yticks([i * (grid[0] + gap) + grid[0] / 2 - 0.5 for i in range(k)], short_names(blocks), fontsize=8)
    axes.set_xticks(
        [j * (grid[1] + gap) + grid[1] / 2 - 0.5 for j in range(t)], [f"{s:.2f}" for s in sigmas], fontsize=8
    )
    axes.tick_params(length=0)
    axes.set_xlabel("sigma (1: noise, 0: data)", fontsize=8)
    axes.set_title(title, fontsize=9)
    if path is not None:
        save(figure, path)
    return figure


def plot_profile(profile: AttentionProfile, *, path: str | Path | None = None) -> Any:
    """Every metric by block and noise level, mean over subjects.

    Raises:
        ImportError: matplotlib is missing; the message names the pip line.
    """
    k, t = len(profile.blocks), len(profile.sigmas)
    wide = min(2, len(profile.values))
    tall = -(-len(profile.values) // wide)
    figure = _figure(min(16.0, wide * (1.6 + 0.45 * t)), min(20.0, tall * (1.2 + 0.36 * k)))
    panels = figure.subplots(tall, wide, squeeze=False).ravel()[: len(profile.values)]
    for axes, (name, values) in zip(panels, profile.values.items(), strict=True):
        table = values.nanmean(-1)
        image = axes.imshow(table.numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(k), short_names(profile.blocks), fontsize=7)
        axes.set_xticks(range(t), [f"{s:.2f}" for s in profile.sigmas], fontsize=7, rotation=90 if t > 8 else 0)
        axes.set_xlabel("sigma", fontsize=8)
        axes.set_title(TITLES.get(name, name), fontsize=8)
        if k * t <= 160:
            for i in range(k):
                for j in range(t):
                    value = table[i, j].item()
                    axes.text(
                        j,
                        i,
                        f"{value:.2f}".lstrip("0"),
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="w" if value < 0.6 else "k",
                    )
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)
    if path is not None:
        save(figure, path)
    return figure


def short_names(blocks: Sequence[str]) -> list[str]:
    """``transformer_blocks.3.attn`` -> ``double 3``, ``single_transformer_blocks.3.attn`` -> ``single 3``; others stay."""
    kinds = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    parts = [name.split(".") for name in blocks]
    return [f"{kinds[p[-3]]} {p[-2]}" if len(p) > 2 and p[-3] in kinds else ".".join(p) for p in parts]
