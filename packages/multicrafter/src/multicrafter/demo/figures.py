"""Figures of a run: picture grid, attention maps, reward curve."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from multicrafter.files import write_whole
from multicrafter.models.loaded import LoadedModel
from multicrafter.training.attention import attention_shares, watch_attention
from multicrafter.training.scenes import EncodedScenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def _banded(labels: Sequence[str], columns: int, *, heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure and the axes of each row, by row. A row has its label above it, large enough to be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.35 * columns, sum(1.35 * h + 0.34 for h in heights)), layout="constrained")
    bands = figure.subfigures(len(labels), 1, squeeze=False, height_ratios=[1.35 * h + 0.34 for h in heights])[:, 0]
    rows = []
    for band, label in zip(bands, labels, strict=True):
        band.suptitle(label, x=0.005, ha="left", fontsize=max(9.0, 2.7 * columns))
        rows.append(band.subplots(1, columns, squeeze=False)[0])
        for axis in rows[-1]:
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
    return figure, rows


def _show(axis: Any, picture: Tensor) -> None:
    axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")


def side_by_side(path: Path, scenes: EncodedScenes, without: Tensor, with_method: Tensor, cases: Sequence[int]) -> Path:
    """The picture that needs no reading: references, what a plain LoRA draws of them, what the method draws from the same noise.

    One column a case; the first ones, not chosen ones.
    """
    count = scenes.references.shape[1]
    labels = [*(f"person {chr(65 + i)}" for i in range(count)), "without: a plain LoRA", "with: the method"]
    figure, rows = _banded(labels, len(cases), heights=[*[0.5] * count, 1, 1])
    for column, case in enumerate(cases):
        for row, picture in enumerate([*scenes.reference_images[case], without[case], with_method[case]]):
            axis = rows[row][column]
            _show(axis, picture)
            for spine in axis.spines.values():
                spine.set_visible(row >= count)
                spine.set_color("tab:red" if row == count else "tab:green")
                spine.set_linewidth(2.5)
    figure.savefig(path, dpi=140)
    return path


def sheet(path: Path, references: Sequence[Any], pictures: Mapping[str, Any], *, title: str = "") -> Path:
    """References (small) and pictures (large) side by side, each picture with its label; all of PIL."""
    from matplotlib.figure import Figure

    widths = [*[1.0] * len(references), *[2.0] * len(pictures)]
    figure = Figure(figsize=(1.6 * sum(widths), 4.0), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    labels = [*(f"reference {chr(65 + i)}" for i in range(len(references))), *pictures]
    for axis, label, picture in zip(axes, labels, [*references, *pictures.values()], strict=True):
        axis.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
        axis.set_title(label, fontsize=10)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format="png")
    return write_whole(path, drawn.getvalue())


def picture_grid(path: Path, scenes: EncodedScenes, pictures: Mapping[str, Tensor], cases: Sequence[int]) -> Path:
    """One column a case: its references on top, then one row per model."""
    m = scenes.references.shape[1]
    labels = [*(f"reference {chr(65 + i)}" for i in range(m)), *pictures]
    figure, rows = _banded(labels, len(cases), heights=[*[0.6] * m, *[1] * len(pictures)])
    for column, case in enumerate(cases):
        for row, picture in enumerate([*scenes.reference_images[case], *(p[case] for p in pictures.values())]):
            _show(rows[row][column], picture)
    figure.savefig(path, dpi=110)
    return path


@torch.no_grad()
def subject_maps(
    model: LoadedModel | DiffusionPipeline,
    scenes: EncodedScenes,
    cases: Sequence[int],
    *,
    blocks: Callable[[str], bool] | Sequence[str] | None = None,
    sigma: float = 0.6,
    seed: int = 0,
) -> Tensor:
    """Where each image token looks: its attention mass on each reference as a share of all references', (case, subject, rows, columns).

    The mean over ``blocks``, chosen as in `idar.integrations.diffusers.attention_blocks`.
    """
    rows = torch.tensor(list(cases))
    model = LoadedModel.of(model)
    text = scenes.encode_text(model, rows)
    generator = torch.Generator().manual_seed(seed)
    captured = watch_attention(
        model.transformer, model.backbone, scenes, rows, text, sigma=sigma, generator=generator, blocks=blocks
    )
    return attention_shares(captured.maps.cpu(), scenes.grid)


def attention_figure(path: Path, scenes: EncodedScenes, maps: Mapping[str, Tensor], cases: Sequence[int]) -> Path:
    """True scene, true masks of subject A, then every model's map of A: red is A, blue is the others."""
    labels = ["scene", "mask of A", *(f"{name}: A" for name in maps)]
    figure, rows = _banded(labels, len(cases), heights=[1] * len(labels))
    for column, case in enumerate(cases):
        _show(rows[0][column], scenes.images[case])
        mask = scenes.masks[case].unflatten(1, scenes.grid)
        rows[1][column].imshow(
            (mask[0] - mask[1:].sum(0)).numpy(), cmap="coolwarm", vmin=-1, vmax=1, interpolation="nearest"
        )
        for row, of in enumerate(maps.values()):
            rows[2 + row][column].imshow(
                (2 * of[column, 0] - 1).numpy(), cmap="coolwarm", vmin=-1, vmax=1, interpolation="nearest"
            )
    figure.savefig(path, dpi=110)
    return path


def reward_curve(path: Path, history: Sequence[Mapping[str, float]]) -> Path:
    """Reward, its parts and any failures over the iterations of stage 2; the thin line is one iteration, the thick one a mean of five."""
    from matplotlib.figure import Figure

    names = ["reward", *sorted(k for k in history[0] if k.startswith("reward_") and k != "reward_spread")]
    if not any(h.get("reward_failures") for h in history):
        names = [name for name in names if name != "reward_failures"]
    figure = Figure(figsize=(2.6 * len(names), 2.2), layout="constrained")
    steps = [h["step"] for h in history]
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = torch.tensor([h[name] for h in history], dtype=torch.float64)
        smooth = [float(values[max(0, i - 2) : i + 3].mean()) for i in range(len(values))]
        axis.plot(steps, values.tolist(), linewidth=0.7, color="tab:gray")
        axis.plot(steps, smooth, linewidth=1.8, color="tab:blue")
        axis.set_title(name.replace("reward_", ""), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("iteration", fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def training_curve(path: Path, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Path:
    """Diffusion and attention loss of stage 1, means of twenty steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("diffusion_loss", "attention_loss"), strict=True):
        for label, history in histories.items():
            values = [h[name] for h in history if name in h]
            width = max(1, min(20, len(values) // 4))
            smooth = [sum(values[i : i + width]) / width for i in range(0, len(values) - width + 1)]
            if smooth:
                axis.plot(range(width, width + len(smooth)), smooth, linewidth=1.4, label=label)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return path
