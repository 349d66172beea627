"""Pictures of runs; needs matplotlib (``pip install "gspo[plot]"``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pyplot() -> Any:
    """matplotlib.pyplot on a canvas without a window.

    Raises:
        ImportError: matplotlib is missing; the message names the pip line.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "gspo[plot]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def scatter(axes: Axes, points: Float[Tensor, "n 2"], *, label: str, color: str) -> None:
    """Points of the plane."""
    x, y = points.T.tolist()
    axes.scatter(x, y, s=8, alpha=0.5, label=label, color=color, linewidths=0)


def save_point_mass(
    path: str | Path,
    before: Float[Tensor, "n 2"],
    after: Float[Tensor, "n 2"],
    target: Sequence[float],
    rewards: Sequence[float],
    clip_fractions: Sequence[float],
    clip_ranges: Sequence[float],
) -> None:
    """Where the samples were and are, the reward, and what the clip did."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    scatter(left, before, label="before", color="tab:gray")
    scatter(left, after, label="after", color="tab:blue")
    left.plot(*target, "*", color="tab:red", markersize=14, label="target")
    left.set_aspect("equal")
    left.legend(loc="lower right")
    left.set_title("samples")
    middle.plot(rewards, color="tab:blue")
    middle.set(title="reward", xlabel="iteration", ylabel="mean of -distance^2 of the rollouts")
    right.plot(clip_fractions, color="tab:orange")
    right.set(title="clip", xlabel="iteration", ylim=(-0.02, 1))
    right.set_ylabel("clip fraction", color="tab:orange")
    other = right.twinx()
    other.semilogy([r if r > 0 else float("nan") for r in clip_ranges], color="tab:green")
    other.set_ylabel("clip range", color="tab:green")
    figure.savefig(path, dpi=110)
    plt.close(figure)
