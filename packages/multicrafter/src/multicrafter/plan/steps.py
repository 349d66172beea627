"""The steps that are planned: the stages' own code on tensors without memory (or with, to check the plan)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import Backbone
from multicrafter.models.flux.model import Text
from multicrafter.training.optimization import AdamWConfig
from multicrafter.training.precision import ExecutionConfig, prepare_transformer
from multicrafter.training.pretrain import Pretrain, PretrainConfig
from multicrafter.training.scenes import EncodedScenes
from multicrafter.training.trainee import Trainee


class Shape(NamedTuple):
    """Tokens of one sample: text, picture (rows, columns), reference (rows, columns), number of references."""

    text: int
    image: tuple[int, int]
    reference: tuple[int, int]
    references: int

    @property
    def total(self) -> int:
        """Of the joint sequence."""
        return self.text + self.image[0] * self.image[1] + self.references * self.reference[0] * self.reference[1]


def build(
    backbone: Backbone, config: dict[str, Any], execution: ExecutionConfig, adapters: AdapterConfig
) -> tuple[nn.Module, Adapters]:
    """The frozen transformer in its dtype, with fp32 adapters; made on the meta device, then given memory (or fake memory).

    Quantisation is left to arithmetic.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(execution.torch_dtype)
    try:
        with torch.device("meta"):
            transformer: Any = backbone.build_transformer(**config)
    finally:
        torch.set_default_dtype(before)
    transformer.requires_grad_(False)
    prepare_transformer(
        transformer, replace(execution, quantization="none", attention_backend=None, compile_blocks=False)
    )
    with torch.device("meta"):
        attached = Adapters(transformer, adapters, backbone=backbone)
    for module in transformer.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and tensor.is_meta:
                    kind[name] = _materialise(tensor)
    return transformer, attached


def _materialise(tensor: Tensor) -> Tensor:
    """Small random numbers on the CPU; what is trained in fp32."""
    dtype = torch.float32 if tensor.requires_grad else tensor.dtype
    made = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if made.is_floating_point():
        made.uniform_(-0.02, 0.02)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def scenes_of(backbone: Backbone, transformer: Any, shape: Shape, count: int) -> EncodedScenes:
    """Zeros (and masks of ones) in the place of encoded scenes."""
    d, n, m = transformer.config.in_channels, shape.image[0] * shape.image[1], shape.reference[0] * shape.reference[1]
    nothing = torch.zeros(count)
    return EncodedScenes(
        torch.zeros(count, n, d), torch.zeros(count, shape.references, m, d), torch.ones(count, shape.references, n),
        [""] * count, nothing, nothing, nothing, nothing, nothing, shape.image, shape.reference,
    )  # fmt: skip


class _Texts:
    """In the place of `encoding_cache.CachedText`."""

    def __init__(self, text: Text) -> None:
        self.text, self.num_tokens = text, int(text.embeds.shape[1])

    def __call__(self, captions: list[str]) -> Text:
        return self.text[torch.arange(len(captions))]  # type: ignore[return-value]


class PlannedPretrain(Pretrain):
    """Stage 1 without pipeline, data and anything that asks a tensor for its value; forward, losses and trainee are the stage's own."""

    def __init__(self, adapters: Adapters, config: PretrainConfig, shape: Shape, *, rows: int) -> None:
        """Makes the optimizer, states included."""
        backbone, transformer = adapters.backbone, adapters.transformer
        self.config, self.backbone, self.transformer, self.adapters = config, backbone, transformer, adapters
        self.trainee = Trainee(
            self.adapters,
            replace(config.execution, attention_backend=None, optimizer="adamw"),
            lr=config.lr,
            adamw=config.adamw,
            seed=0,
        )
        self.optimizer = self.trainee.optimizer
        self.planned = scenes_of(backbone, transformer, shape, rows)
        self.text = _Texts(backbone.empty_text(transformer, rows, shape.text))  # type: ignore[assignment]
        self.rows = rows
        make_states(self.optimizer)

    def _attention_loss(self, maps: Tensor, masks: Tensor, sigma: Tensor) -> Tensor:
        """The loss without the questions whether masks and maps are fine."""
        from idar import idar_loss

        config = self.config.idar
        return idar_loss(
            maps, masks, kind=config.kind, normalization=config.normalization, weight=(sigma <= 1).float()
        ).loss

    def once(self) -> None:
        """Forward, losses, backward, update."""
        self.optimizer.zero_grad()
        noise, sigma = torch.zeros_like(self.planned.tokens), torch.full((self.rows,), 0.5)
        rows = torch.arange(self.rows)
        rows.tolist = lambda: list(range(self.rows))  # type: ignore[method-assign]  # a fake tensor has no values
        with self._capture(self.planned) as captured:
            self._losses(self.planned, rows, noise, sigma, captured)["loss"].backward()
        update(self.trainee)


class PlannedPolicy:
    """Stage 2: the velocity of a rollout, and forward and backward of one row of the window."""

    def __init__(
        self, adapters: Adapters, execution: ExecutionConfig, shape: Shape, *, rows: int, lr: float, adamw: AdamWConfig
    ) -> None:
        """Makes the optimizer, states included."""
        backbone, transformer = adapters.backbone, adapters.transformer
        self.backbone, self.rows, self.adapters = backbone, rows, adapters
        self.trainee = Trainee(
            self.adapters,
            replace(execution, attention_backend=None, optimizer="adamw"),
            lr=lr,
            adamw=adamw,
            seed=0,
        )
        self.optimizer = self.trainee.optimizer
        self.planned = scenes_of(backbone, transformer, shape, rows)
        self.text = backbone.empty_text(transformer, rows, shape.text)
        make_states(self.optimizer)

    def evaluate(self, rows: int | None = None) -> Tensor:
        """One function evaluation."""
        part = slice(0, rows or self.rows)
        context = self.planned.context(part, torch.device("cpu"))
        text = self.text[part]
        return self.trainee.predict(self.planned.tokens[part], torch.full((part.stop,), 0.5), text, **context)  # type: ignore[arg-type]

    def once(self) -> None:
        """Forward and backward of one micro-batch, and the update."""
        self.optimizer.zero_grad()
        velocity = self.evaluate()
        mean = self.planned.tokens - velocity  # the kernel's step: a few tensors of the picture's size
        (mean.square().flatten(1).sum(1)).sum().backward()
        update(self.trainee)


def update(trainee: Trainee) -> None:
    """`Trainee.apply` without the question whether the norm is finite."""
    torch.nn.utils.clip_grad_norm_(list(trainee.adapters.parameters()), 1.0)
    trainee.optimizer.step()
    trainee.update_ema()


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Lets the optimizer make its states, as after a first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def infer(backbone: Backbone, transformer: nn.Module, shape: Shape, rows: int) -> Tensor:
    """One function evaluation of inference."""
    scenes = scenes_of(backbone, transformer, shape, rows)
    dtype = next(transformer.parameters()).dtype
    text = backbone.empty_text(transformer, rows, shape.text)
    context = scenes.context(slice(None), torch.device("cpu"))
    context["references"] = [r.to(dtype) for r in context["references"]]
    pooled = None if text.pooled is None else text.pooled.to(dtype)
    with torch.no_grad():
        return backbone.velocity(
            transformer,
            scenes.tokens.to(dtype),
            torch.full((rows,), 0.5),
            Text(text.embeds.to(dtype), pooled),
            **context,
        )
