"""What a mixture of experts loses when a plain LoRA takes its place: measured on drawn people that neither was made with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multicrafter.models import flux
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import Backbone
from multicrafter.models.checks import check_finite, whole
from multicrafter.models.export import PlainLoRA, ordinary_layers
from multicrafter.models.fitting import Way, applied, distil, plain_of
from multicrafter.models.loaded import LoadedModel
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, cases, draw_cases, score_pictures
from multicrafter.training.scenes import EncodedScenes

SIGMAS = (0.95, 0.8, 0.6, 0.4, 0.2)
"""Noise levels at which velocities are compared, and at which the mixture is shown what it is fitted to."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How a loss is measured.

    Attributes:
        fit_cases: Drawn people that the LoRA is fitted on, of the split for training.
        test_cases: Drawn people of the test split that the loss is measured on.
        distil_steps: Steps of `fitting.distil` after the fit.
        rank: See `fitting.plain_of`.
        batch: Cases at once.
        seed: Of the cases and the noise.
    """

    fit_cases: int = 64
    test_cases: int = 32
    distil_steps: int = 0
    rank: int | None = None
    batch: int = 16
    seed: int = 7

    def __post_init__(self) -> None:
        for name, least in (("fit_cases", 1), ("test_cases", 1), ("distil_steps", 0), ("batch", 1)):
            whole(name, getattr(self, name), least=least)
        check_finite(self)
        if self.rank is not None:
            whole("rank", self.rank, least=1)


class Loss(NamedTuple):
    """Of one plain LoRA against its mixture, means over the test cases.

    velocity: ``|v - v_mixture| / |v_mixture|``, roots of summed squares over cases and noise levels.
    of_change: The same difference over ``|v_base - v_mixture|``: 0 is the mixture, 1 is as far from it as no adapter at all.
    picture: Mean difference of a pixel, in [0, 1], of pictures from the same noise.
    identity, attributes: Of the judges of the drawn world, NaN on a base that does not draw it.
    """

    velocity: float
    of_change: float
    picture: float
    identity: float
    attributes: float


Context = Callable[[], Any]


def knows_the_drawn_world(pipe: Any) -> bool:
    """Whether the judges of the drawn world can read this base's pictures: only of the tiny FLUX that ships."""
    return str(getattr(pipe, "name_or_path", "")) == str(flux.shipped())


def _velocities(
    pipe: Any, backbone: Backbone, scenes: EncodedScenes, config: LossConfig, guidance: float
) -> Iterator[Callable[[], Tensor]]:
    """Every batch at every noise level, as something to call under whichever adapter is on."""
    generator = torch.Generator().manual_seed(config.seed)
    for start in range(0, len(scenes), config.batch):
        rows = slice(start, min(start + config.batch, len(scenes)))
        tokens = scenes.tokens[rows]
        text, context = scenes.encode_text(LoadedModel(pipe, backbone), rows), scenes.context(rows)
        for sigma in SIGMAS:
            noise = torch.randn(tokens.shape, generator=generator).to(tokens)
            noisy, level = (1 - sigma) * tokens + sigma * noise, torch.full((len(tokens),), sigma, device=tokens.device)
            yield partial(backbone.velocity, pipe.transformer, noisy, level, text, guidance=guidance, **context)


@contextmanager
def _without(adapters: Adapters, pipe: Any) -> Iterator[None]:
    """The base inside the context; the mixture is back afterwards, in the same handle."""
    state = adapters.state_dict()
    adapters.detach()
    try:
        yield
    finally:
        again = Adapters(pipe.transformer, adapters.config, backbone=adapters.backbone)
        again.load_state_dict(state)
        adapters.experts, adapters.names = again.experts, again.names


@torch.no_grad()
def plain_loras(
    pipe: Any, adapters: Adapters, ways: Sequence[Way], config: LossConfig
) -> tuple[dict[str, PlainLoRA], dict[str, Loss]]:
    """The plain LoRAs of each way, and what each loses; "mixture" is the adapter itself, "no experts" its attention alone, "base" no adapter.

    Pictures are drawn with attention as it is, since other programs do not separate it.

    Args:
        pipe: With the adapter on it.
        adapters: With experts.
        ways: See `fitting.plain_of`.
        config: How much is drawn.
    """
    asked = evaluation(pipe, adapters, config)
    fitting = cases(
        LoadedModel(pipe, adapters.backbone),
        replace(asked, split="train", num_cases=config.fit_cases, seed=config.seed + 1),
    )
    test = cases(LoadedModel(pipe, adapters.backbone), asked)
    backbone = adapters.backbone
    shown = list(_velocities(pipe, backbone, fitting, config, asked.guidance))

    def run() -> None:
        for velocity in shown:
            velocity()

    loras: dict[str, PlainLoRA] = {way: plain_of(adapters, run, way, rank=config.rank) for way in ways}
    if config.distil_steps:
        targets = [velocity() for velocity in shown]
        with _without(adapters, pipe):
            loras = {
                way: distil(pipe.transformer, lora, lambda i: shown[i](), targets, steps=config.distil_steps)
                for way, lora in loras.items()
            }
    tested = list(_velocities(pipe, backbone, test, config, asked.guidance))

    def seen(context: Context) -> tuple[Tensor, Tensor]:
        with context():
            return torch.cat([v().float().flatten(1) for v in tested]), draw_cases(
                LoadedModel(pipe, backbone), test, asked, batch=config.batch
            ).pictures

    drawn = {"mixture": seen(nullcontext)}
    ordinary = ordinary_layers(adapters.state_dict(), adapters.config)
    with _without(adapters, pipe):
        drawn["no experts"] = seen(partial(applied, pipe.transformer, ordinary))
        drawn["base"] = seen(nullcontext)
        for way, lora in loras.items():
            drawn[way] = seen(partial(applied, pipe.transformer, lora.layers))
    judges = WorldJudges.load() if knows_the_drawn_world(pipe) else None
    losses = {name: _loss(name, drawn, test, judges) for name in ("mixture", *loras, "no experts", "base")}
    told = {
        way: replace(
            lora, exactness={**lora.exactness, **{k: round(v, 4) for k, v in losses[way]._asdict().items() if v == v}}
        )
        for way, lora in loras.items()
    }
    return told, losses


def evaluation(pipe: Any, adapters: Adapters, config: LossConfig) -> EvaluateConfig:
    """Cases, sizes and sampling as the adapter was made for."""
    notes, sampling = adapters.notes, adapters.notes.get("sampling") or {}
    size = int(notes.get("size") or pipe.vae.config.sample_size)
    return EvaluateConfig(
        num_cases=config.test_cases, num_references=int(notes.get("num_references", 1)), size=size,
        reference_size=int(notes.get("reference_size") or size // 2), num_sampling_steps=int(sampling.get("num_steps", 20)),
        guidance=float(sampling.get("guidance", adapters.backbone.default_guidance)), seed=config.seed + 2,
    )  # fmt: skip


def _loss(name: str, drawn: dict[str, tuple[Tensor, Tensor]], test: EncodedScenes, judges: WorldJudges | None) -> Loss:
    velocity, pictures = drawn[name]
    mixture, base = drawn["mixture"], drawn["base"]
    away = float((velocity - mixture[0]).norm())
    change = float((base[0] - mixture[0]).norm())
    read = score_pictures(pictures, test, judges) if judges is not None else {}
    return Loss(
        away / float(mixture[0].norm()), away / change if change else 0.0, float((pictures - mixture[1]).abs().mean()),
        float(np.mean(read.get("identity", np.nan))), float(np.mean(read.get("attributes", np.nan))),
    )  # fmt: skip


def table(losses: dict[str, Loss]) -> str:
    """As text, one line a row."""
    width = max(map(len, losses))
    lines = [" " * width + "  velocity  of the change  picture  identity  attributes"]
    for name, loss in losses.items():
        cells = f"{loss.velocity:8.3f}  {loss.of_change:13.3f}  {loss.picture:7.3f}"
        judged = (
            "       -           -"
            if loss.identity != loss.identity
            else f"{loss.identity:8.3f}  {loss.attributes:10.3f}"
        )
        lines.append(f"{name:<{width}}  {cells}  {judged}")
    return "\n".join(lines)
