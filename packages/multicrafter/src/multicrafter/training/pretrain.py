"""Stage 1: fidelity. ``L = L_diff + lambda * L_attn + router losses`` (MultiCrafter, arXiv 2509.21953, section 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from idar import (
    Background,
    Direction,
    LossKind,
    Normalization,
    SubjectLayout,
    attention_owners,
    idar_loss,
    leakage,
    owner_masks,
    sigma_weight,
)
from idar.integrations.diffusers import attention_blocks, capture_subject_attention, separate_subjects
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.checks import check_finite
from multicrafter.models.flux.model import Text
from multicrafter.models.loaded import LoadedModel
from multicrafter.training.attention import layout_of, noised_velocity, watch_attention
from multicrafter.training.distillation import DistillationConfig, PassOutputs, distillation_loss, watch_outputs
from multicrafter.training.distributed import active, all_sum, my_slice, world_size
from multicrafter.training.encoding_cache import CachedText
from multicrafter.training.loop import LoopConfig
from multicrafter.training.optimization import (
    AdamWConfig,
    ScheduleConfig,
    SigmaSamplingConfig,
    learning_rate,
    sample_sigma,
)
from multicrafter.training.precision import ExecutionConfig, prepare_transformer
from multicrafter.training.previews import Preview, make_preview
from multicrafter.training.scenes import Buckets, EncodedScenes
from multicrafter.training.trainee import Trainee
from multicrafter.world import WorldConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class IDARConfig:
    """Attention supervision; the defaults are the centre of ``studies/regime.py`` (docs/adr/0020-which-arrows.md).

    Attributes:
        coef: lambda; 0 switches it off.
        direction: "reference_to_image" is the paper's letter; "image_to_reference" supervises the arrows that carry features.
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
        """The paper's letter: Dice on maps of reference queries over image keys, divided by their maximum, double blocks."""
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
        if self.background not in ("none", "all"):
            raise UserError(f"background must be 'none' or 'all', got {self.background!r}")
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
        shapes: Sizes (height, width) of photos; each goes to the one nearest to its own aspect, cut so that faces stay inside, and a batch
            holds one of them only. None takes squares of ``world.size``.
        seed: Of data order, noise and adapters; scenes come from ``data_seed``.
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
    data_seed: int = 1
    seed: int = 0
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
        if self.shapes is not None and (not self.shapes or any(side < 1 for shape in self.shapes for side in shape)):
            raise UserError(f"shapes must hold sizes (height, width) in pixels, got {self.shapes}")
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


class Noised(NamedTuple):
    """Rows of encoded scenes at noise levels: what `noised_velocity` takes, on the trainee's device.

    Attributes:
        scenes: Encoded scenes.
        rows: Which of them, b.
        noise: (b, n, d).
        sigma: Noise levels (b,).
        text: Their prompts.
    """

    scenes: EncodedScenes
    rows: Tensor | slice
    noise: Tensor
    sigma: Tensor
    text: Text


@dataclass(frozen=True)
class Objective:
    """``L_diff + lambda * L_attn + router losses`` of a model on encoded scenes, and its gradients; `Pretrain` steps on it, `plan` measures it.

    Attributes:
        config: Of the stage.
        trainee: What is trained.
    """

    config: PretrainConfig
    trainee: Trainee

    def backward(
        self,
        scenes: EncodedScenes,
        rows: Tensor | slice,
        noise: Tensor,
        sigma: Tensor,
        text: Text,
        *,
        separated: Tensor | None = None,
        supervised: bool = True,
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Adds the gradients of ``scale`` times the loss; returns the loss and its parts, means over these rows.

        Args:
            scenes: Encoded scenes.
            rows: Which of them, b.
            noise: (b, n, d).
            sigma: Noise levels (b,).
            text: Their prompts.
            separated: How much the attention of each is separated, (b,); None separates none.
            supervised: Whether the attention is supervised.
            scale: Factor of the gradients.
        """
        device = self.trainee.device
        batch = Noised(scenes, rows, noise.to(device), sigma.to(device), text.to(device))
        teacher = self._teach(batch, separated)
        # the backward stays inside the capture: gradient checkpointing runs blocks again, and must find the same graph
        with (
            self._separate(batch, separated),
            self._capture(batch, supervised) as captured,
        ):
            student = self._pass(batch, watched=teacher is not None)
            losses = self._losses(batch, student, captured)
            if teacher is not None and separated is not None:
                assert self.config.distillation is not None
                learns = 1 - separated.to(device)
                distilled = distillation_loss(student, teacher, self.config.distillation, learns)
                losses["loss"] = losses["loss"] + distilled
                losses["distillation_loss"] = distilled.detach()
            (losses["loss"] * scale).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _pass(self, batch: Noised, *, watched: bool) -> PassOutputs:
        """One pass of the model, its attention layers watched or not."""
        transformer = self.trainee.adapters.transformer
        watching: AbstractContextManager[list[Tensor]] = watch_outputs(transformer) if watched else nullcontext([])
        with watching as outputs:
            return PassOutputs(noised_velocity(self.trainee.predict, *batch), outputs)

    def _teach(self, batch: Noised, separated: Tensor | None) -> PassOutputs | None:
        """The teacher's pass: the same model, separated in every row, without a gradient; None where nobody learns from it."""
        if self.config.distillation is None or separated is None or bool((separated == 1).all()):
            return None
        with torch.no_grad(), self._separate(batch, torch.ones_like(separated)):
            return self._pass(batch, watched=True)

    def _layout(self, batch: Noised) -> SubjectLayout:
        return layout_of(self.trainee.adapters.backbone, batch.scenes, batch.text.embeds.shape[1])

    def _separate(self, batch: Noised, separated: Tensor | None) -> Any:
        """Separates the attention of the chosen samples, by their masks; around forward and backward."""
        config = self.config.separation
        if config is None or separated is None or not bool(separated.any()):
            return nullcontext()
        masks = owner_masks(batch.scenes.masks[batch.rows], threshold=config.threshold).to(self.trainee.device)
        return separate_subjects(
            self.trainee.adapters.transformer,
            self._layout(batch),
            attention_owners if config.routing else masks,
            strength=(config.strength * separated).to(self.trainee.device),
            background=config.background,
        )

    def _capture(self, batch: Noised, supervised: bool) -> Any:
        """Collects the attention maps of what runs inside, if they are supervised; around forward and backward."""
        if self.config.idar.coef == 0 or not supervised:
            return nullcontext()
        return capture_subject_attention(
            self.trainee.adapters.transformer,
            self._layout(batch),
            direction=self.config.idar.direction,
            blocks=(lambda _: True) if self.config.idar.all_blocks else None,
        )

    def _losses(self, batch: Noised, found: PassOutputs, captured: Any) -> dict[str, Tensor]:
        config, device = self.config, self.trainee.device
        diffusion = (found.velocity - (batch.noise - batch.scenes.tokens[batch.rows].to(device))).square().mean()
        loss = diffusion + self.trainee.aux_loss()
        losses = {"diffusion_loss": diffusion}
        if captured is not None:
            masks = batch.scenes.masks[batch.rows].to(device)
            losses["attention_loss"] = self._attention_loss(captured.maps, masks, batch.sigma)
            loss = loss + config.idar.coef * losses["attention_loss"]
        return {"loss": loss, **losses}

    def _attention_loss(self, maps: Tensor, masks: Tensor, sigma: Tensor) -> Tensor:
        """`idar_loss`; 0 where no subject shows, NaN (the step will be skipped) where the maps are broken."""
        config = self.config.idar
        if not bool((masks > 0).any()) or not bool(torch.isfinite(maps).all()):
            return maps.sum() * 0
        weight = sigma_weight(sigma, sigma_max=config.sigma_max)
        return idar_loss(maps, masks, kind=config.kind, normalization=config.normalization, weight=weight).loss


class Pretrain:
    """Stage 1 as a `loop.Stage`, on one process or many (`multicrafter.training.distributed`)."""

    def __init__(
        self,
        model: LoadedModel | DiffusionPipeline,
        config: PretrainConfig,
        scenes: EncodedScenes | Sequence[EncodedScenes],
    ) -> None:
        """Attaches adapters to the pipeline's transformer; several `EncodedScenes` are buckets of different layouts."""
        my_slice(config.batch)  # says early that a batch is too small for the processes
        self.config, self.buckets, self.model = config, Buckets(scenes), LoadedModel.of(model)
        self.transformer, backbone = self.model.transformer, self.model.backbone
        self.text = CachedText(self.model, self.buckets.captions, config.execution.cache)
        prepare_transformer(self.transformer, config.execution)
        self.adapters = Adapters(self.transformer, config.adapters, seed=config.seed, backbone=backbone)
        self.trainee = Trainee(self.adapters, config.execution, lr=config.lr, adamw=config.adamw, seed=config.seed)
        self.optimizer, self.generator = self.trainee.optimizer, self.trainee.generator
        self.objective = Objective(config, self.trainee)

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step on one batch; every rank draws it all and computes its own rows."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.lr, index, config.num_steps)
        scenes = self.buckets.draw(self.generator)
        rows = torch.randint(len(scenes), (config.batch,), generator=self.generator)
        noise = torch.randn(config.batch, *scenes.tokens.shape[1:], generator=self.generator)
        sigma = sample_sigma(config.sigma_sampling, config.batch, self.generator)
        separated = self._draw_separated(sigma)
        self.optimizer.zero_grad()
        parts = self._parts()
        supervised = config.idar.coef > 0 and index < config.idar.until * config.num_steps
        metrics: dict[str, float] = {}
        for number, part in enumerate(parts):
            share = (part.stop - part.start) / config.batch
            text = self._text(scenes, rows[part])
            with self.trainee.accumulating(last=number == len(parts) - 1):
                losses = self.objective.backward(
                    scenes, rows[part], noise[part], sigma[part], text, separated=separated[part], supervised=supervised,
                    scale=share * world_size(),  # ranks are averaged: their shares add up to 1
                )  # fmt: skip
            for name, loss in losses.items():
                metrics[name] = metrics.get(name, 0.0) + share * loss.item()
        self.trainee.samples_seen += config.batch
        norm = self.trainee.apply(config.max_grad_norm)
        if active():
            summed = all_sum(torch.tensor(list(metrics.values()), dtype=torch.float64))
            metrics = dict(zip(metrics, summed.tolist(), strict=True))
        return {**metrics, "grad_norm": norm, "skipped": float(not math.isfinite(norm))}

    def _text(self, scenes: EncodedScenes, rows: Tensor) -> Text:
        """Encoded prompts of some scenes."""
        return self.text([scenes.captions[r] for r in rows.tolist()]) if scenes.text is None else scenes.text(rows)

    def _parts(self) -> list[slice]:
        """This rank's rows of the batch, in micro-batches; equally many on every rank, since gradients are exchanged in the last."""
        mine = my_slice(self.config.batch)
        longest = -(-self.config.batch // world_size())
        number = -(-longest // (self.config.execution.micro_batch or longest))
        edges = [mine.start + (mine.stop - mine.start) * k // number for k in range(number + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges) if b > a or number == 1]

    def _draw_separated(self, sigma: Tensor) -> Tensor:
        """Which samples of the batch are trained with separated attention, (b,); draws nothing where none is."""
        config = self.config.separation
        if config is None:
            return torch.zeros_like(sigma)
        chosen = torch.rand(len(sigma), generator=self.generator) < config.share
        return (chosen & (sigma >= config.sigma_min)).float()

    def preview(self) -> Preview:
        """Attention and routing on the first scenes."""
        scenes = self.buckets.buckets[0]
        rows = torch.arange(min(3, len(scenes)))
        return make_preview(self.trainee, scenes, self._text(scenes, rows), rows)

    def tensors(self) -> dict[str, Tensor]:
        """See `Trainee.tensors`."""
        return self.trainee.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`."""
        self.trainee.restore(tensors)

    def notes(self) -> dict[str, Any]:
        """See `Trainee.notes`."""
        return {"stage": 1, **self.trainee.notes()}

    def check_notes(self, notes: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another stage or of other adapters."""
        if notes.get("stage", 1) != 1:
            raise UserError(f"checkpoint must be of stage 1, got stage {notes['stage']}")
        self.trainee.check_notes(notes)


@torch.no_grad()
def measure_leakage(
    model: LoadedModel | DiffusionPipeline,
    scenes: EncodedScenes,
    *,
    direction: Direction,
    blocks: Callable[[str], bool] | None = None,
    sigmas: tuple[float, ...] = (0.3, 0.6, 0.8),
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Attention leakage (n,), mean over subjects, blocks (the double-stream ones by default) and sigmas; NaN where masks hide each other."""
    return measure_leakages(model, scenes, {"": blocks}, direction=direction, sigmas=sigmas, seed=seed, batch=batch)[""]


@torch.no_grad()
def measure_leakages(
    model: LoadedModel | DiffusionPipeline,
    scenes: EncodedScenes,
    groups: Mapping[str, Callable[[str], bool] | None],
    *,
    direction: Direction,
    sigmas: tuple[float, ...] = (0.3, 0.6, 0.8),
    seed: int = 0,
    batch: int = 64,
) -> dict[str, Tensor]:
    """`measure_leakage` of several groups of blocks, by name, in the same passes."""
    generator = torch.Generator().manual_seed(seed)
    model = LoadedModel.of(model)
    names = {group: list(attention_blocks(model.transformer, blocks)) for group, blocks in groups.items()}
    together = list(dict.fromkeys(name for chosen in names.values() for name in chosen))
    total = {group: torch.zeros(len(scenes)) for group in groups}
    for sigma in sigmas:
        for start in range(0, len(scenes), batch):
            part = slice(start, min(start + batch, len(scenes)))
            captured = watch_attention(
                model.transformer, model.backbone, scenes, part, scenes.encode_text(model, part),
                sigma=sigma, generator=generator, direction=direction, blocks=together, keep_blocks=True,
            )  # fmt: skip
            for group, chosen in names.items():
                maps = torch.stack([captured.blocks[n] for n in chosen]).mean(0).cpu()
                total[group][part] += leakage(maps, scenes.masks[part]).nanmean(1)
    return {group: value / len(sigmas) for group, value in total.items()}
