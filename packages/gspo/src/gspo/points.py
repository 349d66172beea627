"""Objectives that are a mean over points: states at which the velocity is evaluated, each with a loss of its own.

An objective is one file: it says at which points it wants the velocity (`Objective.points`), and what the velocity costs there
(`Objective.loss`). `ObjectiveTrainer` does the rest: micro-batches, ranks, the old policy, gradient clipping, resuming. See
`gspo.nft`, `gspo.awm` and `gspo.dppo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from gspo.checks import one_line
from gspo.inputs import require_tensor
from gspo.rollout import Rollout


class Point(Protocol):
    """A state of every row of a rollout, at which the velocity is evaluated."""

    @property
    def latents(self) -> Float[Tensor, "b ..."]:
        """What the velocity is evaluated at, (b, ...)."""
        ...

    @property
    def levels(self) -> Float[Tensor, " b"]:
        """Noise level of each row, (b,) fp32, beside the latents."""
        ...

    def rows(self, rows: Tensor, device: torch.device) -> Point:
        """Some of the rows, on a device."""
        ...


PointT = TypeVar("PointT", bound=Point)


class RowLosses(NamedTuple):
    """What an objective says of one point.

    Attributes:
        loss: One loss per row (or per row and token), shaped as the advantages; 0 where the advantage is NaN.
        metrics: Numbers to log by name, one per row; without gradients.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol[PointT]):
    """What `ObjectiveTrainer` needs of an objective.

    Attributes:
        needs_trajectory: The points are steps of the rollout's window, so it must be drawn by `rollout` with a stochastic kernel.
            False: they are made from its final samples, which any solver may draw.
        silent_without_advantage: A row whose advantage is 0 has no gradient, and need not be passed through the model.
    """

    @property
    def needs_trajectory(self) -> bool:
        """See the class."""
        ...

    @property
    def silent_without_advantage(self) -> bool:
        """See the class."""
        ...

    def points(self, rollout: Rollout, generator: torch.Generator | None) -> Sequence[PointT]:
        """Where the velocity is wanted, with whatever `loss` needs there."""
        ...

    def loss(self, velocity: Tensor, old_velocity: Tensor, point: PointT, advantages: Tensor) -> RowLosses:
        """The loss of every row.

        Args:
            velocity: Of the policy at the point, (b, ...), with gradients.
            old_velocity: Of the policy that drew the samples, (b, ...), without.
            point: One of `points`, with the same rows.
            advantages: (b,), or (b, n) for latents (b, n, ...); NaN leaves a row out.
        """
        ...

    def decay(self, iteration: int) -> float:
        """How slowly the old policy follows after this iteration, in [0, 1]; 0 copies, so that samples are always on policy."""
        ...


def mean_of_rest(values: Float[Tensor, "b ..."], like: Tensor) -> Tensor:
    """The mean over all axes beyond those of ``like``: (b, n, c) gives (b,) beside (b,), and (b, n) beside (b, n).

    >>> mean_of_rest(torch.tensor([[1.0, 3.0]]), torch.zeros(1)).tolist()
    [2.0]
    """
    return values.reshape(*like.shape, -1).mean(-1)


def reduce_rows(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """Losses with 0 where the weight is not finite ("none"), or their mean over the others ("mean").

    Raises:
        ValueError: Another reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {one_line(reduction)}")
    keep = torch.isfinite(weights)
    losses = torch.where(keep, losses, torch.zeros_like(losses))
    return losses if reduction == "none" else losses.sum() / keep.sum().clamp_min(1)


def check_velocities(weights: Tensor, weights_name: str, velocity: Tensor, **others: Tensor) -> None:
    """One sentence for what does not fit.

    Raises:
        ValueError: Velocities differ in shape, or weights are neither one per row nor one per row and token.
    """
    require_tensor(**{weights_name: weights}, velocity=velocity, **others)
    if velocity.dim() < 2 or len(velocity) == 0:
        raise ValueError(f"velocity must be (b, ...) with b at least 1, got shape {tuple(velocity.shape)}")
    for name, tensor in others.items():
        if tensor.shape != velocity.shape:
            raise ValueError(
                f"{name} must have the shape of velocity {tuple(velocity.shape)}, got {tuple(tensor.shape)}"
            )
    if weights.dim() not in (1, 2) or weights.shape != velocity.shape[: weights.dim()]:
        raise ValueError(
            f"{weights_name} must be (b,) or (b, n) for velocity {tuple(velocity.shape)}, got {tuple(weights.shape)}"
        )
