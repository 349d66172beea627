"""Stage 1: fidelity. ``L = L_diff + lambda * L_attn + router losses`` (MultiCrafter, arXiv 2509.21953, section 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from idar import (
    SubjectLayout,
    attention_owners,
    idar_loss,
    owner_masks,
    sigma_weight,
)
from idar.integrations.diffusers import capture_subject_attention, separate_subjects
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import Backbone
from multicrafter.models.flux.model import Text
from multicrafter.models.loaded import LoadedModel
from multicrafter.training.attention import layout_of, noised_velocity
from multicrafter.training.attention import measure_leakage as measure_leakage
from multicrafter.training.attention import measure_leakages as measure_leakages
from multicrafter.training.distillation import PassOutputs, distillation_loss, watch_outputs
from multicrafter.training.distributed import active, all_sum, my_slice, world_size
from multicrafter.training.encoding_cache import CachedText, rest_encoders
from multicrafter.training.optimization import (
    learning_rate,
    sample_sigma,
)
from multicrafter.training.precision import prepare_transformer
from multicrafter.training.pretrain_config import IDARConfig as IDARConfig
from multicrafter.training.pretrain_config import PretrainConfig as PretrainConfig
from multicrafter.training.pretrain_config import SamplingConfig as SamplingConfig
from multicrafter.training.pretrain_config import SeparationConfig as SeparationConfig
from multicrafter.training.pretrain_config import sampling_notes as sampling_notes
from multicrafter.training.previews import Preview, make_preview
from multicrafter.training.scenes import Buckets, EncodedScenes
from multicrafter.training.trainee import Trainee

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
        return layout_of(self.trainee.adapters.backbone, batch.scenes, batch.text)

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


def _attach(transformer: Any, backbone: Backbone, config: PretrainConfig) -> Adapters:
    """New adapters, or those of ``config.start``."""
    if config.start is None:
        return Adapters(transformer, config.adapters, seed=config.seed, backbone=backbone)
    adapters, notes = Adapters.load(transformer, config.start, backbone=backbone)
    wrong = None
    if adapters.config != config.adapters:
        wrong = f"an adapter of the configuration in adapters, {config.adapters}, got {adapters.config}"
    elif notes.get("stage", 1) != 1:
        wrong = f"an adapter of stage 1, got one of stage {notes['stage']}"
    if wrong is not None:
        adapters.detach()
        raise UserError(f"start {config.start} must be {wrong}")
    return adapters


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
        rest_encoders(self.model)
        prepare_transformer(self.transformer, config.execution, device=self.model.device)
        self.adapters = _attach(self.transformer, backbone, config)
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
