"""Self-distillation: the model with separated attention teaches the same model without, so that it needs no masks when it draws.

    L = w_v ||v - v*||^2 + w_a mean_l ||o_l - o*_l||^2 / ||o*_l||^2

``v`` is the velocity and ``o_l`` the output of the l-th attention layer of the model as it is. Stars mark the same model, at the same
noise, with attention between subjects forbidden by the true masks and without a gradient. What is forbidden changes the outputs of
attention and nothing else: a student that reproduces these has learned whom to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from idar.integrations.diffusers import attention_blocks
from jaxtyping import Float
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.checks import check_finite


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Weights of the two targets. The teacher is the model itself, trained with separated attention in some samples (`SeparationConfig`).

    Neither has a default, because none has been found to help (docs/adr/0055-a-model-does-not-teach-itself.md).

    Attributes:
        velocity: w_v.
        attention: w_a.
    """

    velocity: float
    attention: float

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("velocity", "attention"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.velocity == 0 == self.attention:
            raise UserError("velocity or attention must be positive in a distillation, got 0 for both")


class PassOutputs(NamedTuple):
    """What a pass of the model leaves for the other: its velocity (b, n, d), and the outputs of its attention layers in order."""

    velocity: Float[Tensor, "b n d"]
    attention: list[Tensor]


@contextmanager
def watch_outputs(transformer: Any) -> Iterator[list[Tensor]]:
    """Collects the outputs (b, n, d) of every attention layer during a pass; of double-stream layers, those of both streams."""
    outputs: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        outputs.extend(output if isinstance(output, tuple) else (output,))

    hooks = [block.register_forward_hook(keep) for block in attention_blocks(transformer, lambda _: True).values()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def distillation_loss(
    student: PassOutputs, teacher: PassOutputs, config: DistillationConfig, weight: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """The loss of the module's first lines: of each row times its weight, and the mean over the rows.

    Args:
        student: With a gradient.
        teacher: Of the same rows.
        config: Weights of the targets.
        weight: Of the rows: 1 where a row learns, 0 where not. So equal parts of a batch have losses whose mean is the batch's.
    """
    loss = config.velocity * _row_means((student.velocity - teacher.velocity).square())
    if config.attention:
        loss = loss + config.attention * _distance(student.attention, teacher.attention)
    return (weight * loss).mean()


def _distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, " b"]:
    """Mean over layers of the squared distance to the target, in units of the target's own square."""
    layers = [
        _row_means((own - target).square()) / _row_means(target.square()).clamp_min(1e-12)
        for own, target in zip(student, teacher, strict=True)
    ]
    return torch.stack(layers).mean(0)


def _row_means(values: Tensor) -> Float[Tensor, " b"]:
    return values.float().flatten(1).mean(1)
