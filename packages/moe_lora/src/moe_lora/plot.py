"""Pictures of routing statistics; needs the extra ``plot``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lora.stats import By, RoutingLog

try:
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover
    raise ImportError('moe_lora.plot needs matplotlib: pip install "moe-lora[plot]"') from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _short(names: list[str]) -> list[str]:
    """Layer names of at most 34 characters, the end kept."""
    return [n if len(n) <= 34 else "…" + n[-33:] for n in names]


def plot_load(log: RoutingLog, path: str | Path, by: By = "kind") -> Path:
    """One panel per kind, sigma bin or layout: expert load (columns) by layer (rows); at the right what an expert tells about it.

    Darker is more; an even load has the middle colour everywhere, twice an even share and more the darkest. The bars are the mutual
    information between expert and label in nats, the line over them its upper limit.

    Args:
        log: From `moe_lora.collect`, with at least one pass.
        path: Of the PNG (or any format matplotlib knows by its suffix); written whole or not at all.
        by: "kind", "sigma", "layout" or "block" (one panel, and the entropy of the load instead of the information).

    Raises:
        ValueError: Nothing was counted.
    """
    if not log.counts:
        raise ValueError("log must hold at least one pass, got none: run the model inside the collect context")
    layers = list(log.counts)
    names = log.joint(by, layers[0])[0] if by != "block" else ["all tokens"]
    load = log.load(by)
    experts = max(t.shape[1] for t in load.values())
    figure = Figure(figsize=(2.6 + 1.5 * (len(names) + 1), 1.6 + 0.24 * len(layers)), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0])
    for column, (name, axis) in enumerate(zip(names, axes, strict=False)):
        table = [
            [float(load[x][column, i]) if i < load[x].shape[1] else math.nan for i in range(experts)] for x in layers
        ]
        image = axis.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=min(1.0, 2 / experts))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("expert", fontsize=8)
        axis.set_xticks(range(experts))
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(layers)), _short(layers))
    bars = axes[-1]
    if by == "block":
        values, limit, title = log.entropy(), math.log(experts), "entropy of the load"
    else:
        values, limit, title = (
            log.mutual_information(by),
            math.log(min(experts, max(len(names), 1))),
            "mutual information",
        )
    bars.barh(range(len(layers)), [values[x] for x in layers], color="#d9793a")
    bars.axvline(limit, color="0.4", linewidth=1, linestyle=":")
    bars.set_xlim(0, max(limit * 1.08, 1e-3))
    bars.set_title(title, fontsize=9)
    bars.set_xlabel("nats", fontsize=8)
    bars.tick_params(labelsize=7)
    bar = figure.colorbar(
        image,
        ax=axes[:-1],
        shrink=0.9,
        pad=0.02,
        location="bottom",
        aspect=40,
        extend="max" if experts > 2 else "neither",
    )
    bar.set_label("share of assignments", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.stem + ".tmp" + (path.suffix or ".png"))
    figure.savefig(unfinished, dpi=130)
    os.replace(unfinished, path)
    return path
