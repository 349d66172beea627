"""What stage 1 can be told (MultiCrafter, arXiv 2509.21953, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from idar import Background, Direction, LossKind, Normalization

from multicrafter import UserError
from multicrafter.models.adapters import AdapterConfig
from multicrafter.models.checks import check_finite
from multicrafter.training.distillation import DistillationConfig
from multicrafter.training.loop import LoopConfig
from multicrafter.training.optimization import AdamWConfig, ScheduleConfig, SigmaSamplingConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.world import WorldConfig
from multicrafter.world.scenes import check_shapes


@dataclass(frozen=True, kw_only=True)
class IDARConfig:
    """Attention supervision; the defaults are the setting that did best in ``studies/regime.py`` (docs/adr/0020-which-arrows.md).

    Attributes:
        coef: lambda; 0 switches it off.
        direction: "reference_to_image" is what the paper supervises; "image_to_reference" is the attention that carries features.
        kind: Loss, see `idar.idar_loss`.
        normalization: Of the maps, see `idar.normalize_maps`.
        sigma_max: Samples noisier than this are not supervised: there the place of a subject cannot be known yet.
        all_blocks: Supervise the single-stream blocks too.
        until: Share of the steps, from the first one on, that are supervised: what was separated early stays so, and the rest of the
            steps are for fidelity alone.
    """

    coef: float = 0.1
    direction: Direction = "image_to_reference"
    kind: LossKind = "share_cross_entropy"
    normalization: Normalization = "none"
    sigma_max: float = 0.8
    all_blocks: bool = True
    until: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self)
        if not 0 < self.until <= 1:
            raise UserError(f"until must be in (0, 1], got {self.until}")
        if self.coef < 0:
            raise UserError(f"coef must not be negative, got {self.coef}")
        if not 0 < self.sigma_max <= 1:
            raise UserError(f"sigma_max must be in (0, 1], got {self.sigma_max}")

    @classmethod
    def paper(cls, coef: float = 0.3) -> IDARConfig:
        """As the paper writes it: Dice on maps of reference queries over image keys, divided by their maximum, double blocks."""
        return cls(
            coef=coef,
            direction="reference_to_image",
            kind="dice",
            normalization="max",
            sigma_max=1.0,
            all_blocks=False,
        )


@dataclass(frozen=True, kw_only=True)
class SeparationConfig:
    """Separated attention in training (mask dropout): some samples are trained with it, so that ONE model draws well with and without.

    Attributes:
        share: Of the samples that are trained with attention between subjects forbidden by their true masks.
        strength: 1 forbids it, less weighs it down; see `idar.separation_bias`.
        background: Whether tokens of nobody look at no reference or at all of them.
        threshold: A token belongs to the subject that covers most of it, if it covers at least this share.
        sigma_min: Samples less noisy than this are not separated.
        routing: Not the true masks but each block's own attention says who owns a token (MUSAR, arXiv 2505.02823); a baseline.
    """

    share: float = 0.5
    strength: float = 1.0
    background: Background = "none"
    threshold: float = 0.15
    sigma_min: float = 0.0
    routing: bool = False

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("share", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold must be in (0, 1], got {self.threshold}")
        if not 0 <= self.sigma_min < 1:
            raise UserError(f"sigma_min must be in [0, 1), got {self.sigma_min}")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How pictures of the trained adapter are drawn where nobody says otherwise; written into the adapter.

    Attributes:
        num_sampling_steps: Euler steps.
        guidance: Embedded guidance; None is the backbone's.
    """

    num_sampling_steps: int = 20
    guidance: float | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        if self.num_sampling_steps < 1:
            raise UserError(f"num_sampling_steps must be at least 1, got {self.num_sampling_steps}")
        if self.guidance is not None and not 1 <= self.guidance < math.inf:
            raise UserError(f"guidance must be at least 1 and finite, got {self.guidance}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Stage 1.

    Attributes:
        num_steps: Optimizer steps.
        batch: Scenes a step.
        lr: Peak learning rate.
        schedule: How it rises and falls.
        adamw: The rest of the optimizer.
        max_grad_norm: Gradients are clipped to this norm, over all adapters.
        sigma_sampling: At which noise levels.
        num_scenes: Scenes drawn and encoded; of photos, samples: more than there are records come again, cut anew, with other references.
        data: Folder of `multicrafter data build`: photos instead of drawn scenes, at the sizes of ``world``. None draws.
        shapes: Sizes (height, width) of pictures; a batch holds one of them only. A photo goes to the one nearest to its own aspect, cut so
            that faces stay inside; of drawn scenes there are as many of each. None takes ``world.shape``, or squares of ``world.size``.
        reference_shapes: Sizes (height, width) of references, of which a batch holds one only; there are as many of each, cut from the middle
            of photos' references. None takes ``world.reference_shape``, or squares of ``world.reference_size``. How many references a
            subject has says ``world.references_per_subject``; of photos those of a batch have as many as all its people have, at most so many.
        data_seed: Of the drawn scenes.
        seed: Of data order, noise and adapters.
        start: Folder of a stage-1 adapter whose weights training goes on from, as in a run of its own (a new schedule, new moving averages);
            None starts from adapters that change nothing.
        separation: See `SeparationConfig`; None trains without it.
        distillation: See `DistillationConfig`; the samples that are not separated learn from the same model with separation. None does without.
        sampling: How its pictures are drawn; None leaves that to the backbone.
        execution: Precision, memory, processes.
        loop: How often checkpoints and pictures are written, and when to give up.
    """

    num_steps: int = 400
    batch: int = 32
    lr: float = 2e-3
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    max_grad_norm: float = 1.0
    sigma_sampling: SigmaSamplingConfig = field(default_factory=SigmaSamplingConfig)
    num_scenes: int = 4000
    data: str | None = None
    shapes: tuple[tuple[int, int], ...] | None = None
    reference_shapes: tuple[tuple[int, int], ...] | None = None
    data_seed: int = 1
    seed: int = 0
    start: str | None = None
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    idar: IDARConfig = field(default_factory=IDARConfig)
    separation: SeparationConfig | None = None
    distillation: DistillationConfig | None = None
    sampling: SamplingConfig | None = None
    world: WorldConfig = field(default_factory=lambda: WorldConfig(numbers=(2,), shared_attributes=4))
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(save_every=200, picture_every=50))

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("num_steps", "batch", "num_scenes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0:
            raise UserError(f"lr must be positive, got {self.lr}")
        check_shapes(self.shapes)
        check_shapes(self.reference_shapes, name="reference_shapes")
        if not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        if self.distillation is not None:
            if self.separation is None or self.separation.routing or self.separation.share in (0, 1):
                raise UserError(
                    "distillation needs separation by masks in some of the samples and not in others, got "
                    f"{'none' if self.separation is None else self.separation}"
                )
            for name in ("gradient_checkpointing", "compile_blocks"):
                if self.distillation.attention and getattr(self.execution, name):
                    raise UserError(f"distillation.attention needs execution.{name} to be off, got both")


def sampling_notes(config: PretrainConfig) -> dict[str, Any]:
    """What an adapter says of how its pictures are drawn (``sampling`` in adapter.json)."""
    notes: dict[str, Any] = {"separation": "none" if config.separation is None else "draft"}
    if config.sampling is not None:
        notes["num_steps"] = config.sampling.num_sampling_steps
        if config.sampling.guidance is not None:
            notes["guidance"] = config.sampling.guidance
    return notes
