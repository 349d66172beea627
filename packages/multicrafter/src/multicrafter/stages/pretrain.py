"""Stage 1: fidelity. ``L = L_diff + lambda * L_attn + router losses`` (MultiCrafter, arXiv 2509.21953, section 3)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from idar import Direction, LossKind, Normalization, SubjectLayout, idar_loss, leakage
from idar.integrations.diffusers import capture_subject_attention
from torch import Tensor

from multicrafter.adapters import AdapterConfig, Adapters
from multicrafter.backbones import Backbone, backbone_of
from multicrafter.data.synthetic import WorldConfig
from multicrafter.flux.model import add_noise
from multicrafter.loop import optimizer_tensors, restore_optimizer
from multicrafter.stages.data import EncodedScenes

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@dataclass(frozen=True, kw_only=True)
class IDARConfig:
    """Attention supervision.

    Attributes:
        coef: lambda; 0 switches it off.
        direction: "reference_to_image" is the paper's letter; "image_to_reference" supervises the arrows that carry features.
        kind: Loss, see `idar.idar_loss`.
        normalization: Of the maps, see `idar.normalize_maps`.
        sigma_max: Samples noisier than this are not supervised: there the place of a subject cannot be known yet.
        all_blocks: Supervise the single-stream blocks too.
    """

    coef: float = 0.3
    direction: Direction = "image_to_reference"
    kind: LossKind = "share_cross_entropy"
    normalization: Normalization = "none"
    sigma_max: float = 1.0
    all_blocks: bool = False

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        if not 0 < self.sigma_max <= 1:
            raise ValueError(f"sigma_max must be in (0, 1], got {self.sigma_max}")

    @classmethod
    def paper(cls, coef: float = 0.3) -> IDARConfig:
        """The paper's letter: Dice on maps of reference queries over image keys, divided by their maximum, double blocks."""
        return cls(coef=coef, direction="reference_to_image", kind="dice", normalization="max")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Stage 1.

    Attributes:
        num_steps: Optimizer steps.
        batch: Scenes a step.
        lr: Peak learning rate; warm-up of 20 steps, linear decay to zero.
        num_scenes: Scenes drawn and encoded.
        seed: Of data order, noise and adapters; scenes come from ``data_seed``.
    """

    num_steps: int = 400
    batch: int = 32
    lr: float = 2e-3
    num_scenes: int = 4000
    data_seed: int = 1
    seed: int = 0
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    idar: IDARConfig = field(default_factory=IDARConfig)
    world: WorldConfig = field(default_factory=lambda: WorldConfig(numbers=(2,), shared_attributes=4))

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch", "num_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


def layout_of(backbone: Backbone, scenes: EncodedScenes, num_text: int) -> SubjectLayout:
    """Where everything is in the joint sequence."""
    return backbone.layout(num_text, scenes.grid, [scenes.reference_grid] * scenes.references.shape[1])


class Pretrain:
    """Stage 1 as a `loop.Stage`."""

    def __init__(self, pipe: FluxPipeline, config: PretrainConfig, scenes: EncodedScenes) -> None:
        """Attaches adapters to the pipeline's transformer."""
        self.config, self.scenes, self.transformer = config, scenes, pipe.transformer
        self.backbone = backbone_of(pipe)
        self.adapters = Adapters(pipe.transformer, config.adapters, seed=config.seed, backbone=self.backbone)
        self.optimizer = torch.optim.AdamW(
            self.adapters.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        unique = sorted(set(scenes.captions))
        with torch.no_grad():
            self.text = self.backbone.encode_prompts(pipe, unique)
        self.text_row = torch.tensor([unique.index(c) for c in scenes.captions])
        self.layout = layout_of(self.backbone, scenes, self.text.embeds.shape[1])

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step on one batch."""
        config, scenes = self.config, self.scenes
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1, (index + 1) / 20) * (1 - index / config.num_steps)
        rows = torch.randint(len(scenes), (config.batch,), generator=self.generator)
        latents = scenes.tokens[rows]
        noise = torch.randn(latents.shape, generator=self.generator)
        sigma = torch.sigmoid(torch.randn(config.batch, generator=self.generator))
        supervise = config.idar.coef > 0
        capture = (
            capture_subject_attention(
                self.transformer,
                self.layout,
                direction=config.idar.direction,
                blocks=(lambda _: True) if config.idar.all_blocks else None,
            )
            if supervise
            else nullcontext()
        )
        with capture as captured:
            velocity = self.backbone.velocity(
                self.transformer,
                add_noise(latents, noise, sigma),
                sigma,
                self.text[self.text_row[rows]],
                **scenes.context(rows),
            )
        diffusion = (velocity - (noise - latents)).square().mean()
        loss = diffusion + self.adapters.aux_loss()
        metrics = {"diffusion_loss": diffusion.item()}
        if captured is not None:
            weight = (sigma <= config.idar.sigma_max).float()
            attention = idar_loss(
                captured.maps,
                scenes.masks[rows],
                kind=config.idar.kind,
                normalization=config.idar.normalization,
                weight=weight,
            ).loss
            loss = loss + config.idar.coef * attention
            metrics["attention_loss"] = attention.item()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.adapters.parameters()), 1.0)
        self.optimizer.step()
        return {"loss": loss.item(), **metrics}

    def tensors(self) -> dict[str, Tensor]:
        """Adapters, optimizer and generator."""
        return {
            **{f"adapters.{k}": v for k, v in self.adapters.state_dict().items()},
            **optimizer_tensors(self.optimizer),
            "generator": self.generator.get_state(),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores `tensors`."""
        self.adapters.load_state_dict(
            {k.removeprefix("adapters."): v for k, v in tensors.items() if k.startswith("adapters.")}
        )
        restore_optimizer(self.optimizer, tensors)
        self.generator.set_state(tensors["generator"])


@torch.no_grad()
def measure_leakage(
    pipe: FluxPipeline,
    scenes: EncodedScenes,
    *,
    direction: Direction,
    sigmas: tuple[float, ...] = (0.3, 0.6, 0.8),
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Attention leakage (n,), mean over subjects, double blocks and sigmas; NaN where masks hide each other."""
    generator = torch.Generator().manual_seed(seed)
    total, backbone = torch.zeros(len(scenes)), backbone_of(pipe)
    for sigma in sigmas:
        for start in range(0, len(scenes), batch):
            part = slice(start, min(start + batch, len(scenes)))
            latents = scenes.tokens[part]
            noise = torch.randn(latents.shape, generator=generator)
            level = torch.full((len(latents),), sigma)
            text = backbone.encode_prompts(pipe, scenes.captions[part])
            with capture_subject_attention(
                pipe.transformer, layout_of(backbone, scenes, text.embeds.shape[1]), direction=direction
            ) as captured:
                backbone.velocity(
                    pipe.transformer, add_noise(latents, noise, level), level, text, **scenes.context(part)
                )
            total[part] += leakage(captured.maps, scenes.masks[part]).nanmean(1)
    return total / len(sigmas)
