"""The steps that are planned: the stages' own code on tensors without memory (or with, to check the plan)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import Backbone
from multicrafter.training.optimization import AdamWConfig
from multicrafter.training.precision import ExecutionConfig, prepare_transformer
from multicrafter.training.pretrain import Objective
from multicrafter.training.pretrain_config import PretrainConfig
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
        for name, value in list(vars(module).items()):  # tables that are neither, such as Qwen-Image's rotations
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, _materialise(value))
    return transformer, attached


def _materialise(tensor: Tensor) -> Tensor:
    """Small random numbers on the CPU; what is trained in fp32."""
    dtype = torch.float32 if tensor.requires_grad else tensor.dtype
    made = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if made.is_complex():
        made.fill_(1)
    if made.is_floating_point():
        made.uniform_(-0.02, 0.02)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def scenes_of(backbone: Backbone, transformer: Any, shape: Shape, count: int) -> EncodedScenes:
    """Zeros (and masks of ones) in the place of encoded scenes."""
    d, n, m = transformer.config.in_channels, shape.image[0] * shape.image[1], shape.reference[0] * shape.reference[1]
    return EncodedScenes(
        tokens=torch.zeros(count, n, d), references=torch.zeros(count, shape.references, m, d),
        masks=torch.ones(count, shape.references, n), captions=[""] * count, images=torch.zeros(0, 3, 1, 1),
        reference_images=torch.zeros(0, shape.references, 3, 1, 1), grid=shape.image, reference_grid=shape.reference,
    )  # fmt: skip


class PlannedPretrain:
    """Stage 1 on invented scenes: its own objective, trainee and update, without pipeline, data and loop."""

    def __init__(self, adapters: Adapters, config: PretrainConfig, shape: Shape, *, rows: int) -> None:
        """Makes the optimizer, states included."""
        self.config, self.adapters, self.rows = config, adapters, rows
        execution = replace(config.execution, attention_backend=None, optimizer="adamw")
        self.trainee = Trainee(adapters, execution, lr=config.lr, adamw=config.adamw, seed=0)
        self.objective = Objective(config, self.trainee)
        self.optimizer = self.trainee.optimizer
        self.planned = scenes_of(adapters.backbone, adapters.transformer, shape, rows)
        self.text = adapters.backbone.empty_text(adapters.transformer, rows, shape.text)
        self.noise, self.sigma = torch.zeros_like(self.planned.tokens), torch.full((rows,), 0.5)
        make_states(self.optimizer)

    def forward_backward(self) -> None:
        """Losses and their gradients, in place of those before."""
        self.optimizer.zero_grad()
        self.objective.backward(self.planned, slice(0, self.rows), self.noise, self.sigma, self.text)

    def once(self) -> None:
        """Forward, losses, backward, update."""
        self.forward_backward()
        self.trainee.apply(self.config.max_grad_norm)


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
        part, device = slice(0, rows or self.rows), self.trainee.device
        context, text = self.planned.context(part, device), self.text.rows(part).to(device)
        sigma = torch.full((part.stop,), 0.5, device=device)
        return self.trainee.predict(self.planned.tokens[part].to(device), sigma, text, **context)

    def once(self) -> None:
        """Forward and backward of one micro-batch, and the update."""
        self.optimizer.zero_grad()
        velocity = self.evaluate()
        mean = (
            self.planned.tokens.to(velocity.device) - velocity
        )  # the kernel's step: a few tensors of the picture's size
        (mean.square().flatten(1).sum(1)).sum().backward()
        self.trainee.apply(1.0)


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
    with torch.no_grad():
        return backbone.velocity(
            transformer,
            scenes.tokens.to(dtype),
            torch.full((rows,), 0.5),
            text.to(scenes.tokens.device, dtype),
            **context,
        )
