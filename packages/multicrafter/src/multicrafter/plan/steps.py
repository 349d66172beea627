"""The steps that are planned: the stages' own code on tensors without memory (or with, to check the plan)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from gspo import OnlineConfig, PolicyTrainer, SlidingWindow, policy_step
from torch import Tensor, nn

from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import Backbone
from multicrafter.training.align import online_config, policy_velocity
from multicrafter.training.align_config import AlignConfig, online_defaults
from multicrafter.training.optimization import AdamWConfig
from multicrafter.training.precision import ExecutionConfig, prepare_transformer
from multicrafter.training.pretrain import Objective
from multicrafter.training.pretrain_config import PretrainConfig
from multicrafter.training.scenes import EncodedScenes
from multicrafter.training.trainee import Trainee


class Shape(NamedTuple):
    """Tokens of one sample: text, picture (rows, columns), reference (rows, columns), number of references, and of those of each subject."""

    text: int
    image: tuple[int, int]
    reference: tuple[int, int]
    references: int
    references_per_subject: int = 1

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
            elif isinstance(value, list) and any(isinstance(item, Tensor) and item.is_meta for item in value):
                setattr(module, name, [_materialise(item) for item in value])
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
        masks=torch.ones(count, shape.references // shape.references_per_subject, n), captions=[""] * count, images=torch.zeros(0, 3, 1, 1),
        reference_images=torch.zeros(0, shape.references, 3, 1, 1), grid=shape.image, reference_grid=shape.reference,
        references_per_subject=shape.references_per_subject,
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
    """Stage 2 on invented scenes: gspo's own iteration, without pipeline, pictures and loop.

    It is `gspo.policy_step` with the run's kernel, ratio, clip range and KL, as short as it can be: one group, drawn in one stochastic step
    and one other, and one pass with gradients over it. `iteration_evaluations` says how many such passes a whole iteration has. Two things
    are invented, because only data would tell them: every group has two different rewards, so that no sample is dropped, and the policy is
    still the one that drew, so that nothing is passed over twice (on fake tensors `Answers` says so).
    """

    def __init__(
        self,
        adapters: Adapters,
        execution: ExecutionConfig,
        shape: Shape,
        *,
        rows: int,
        lr: float,
        adamw: AdamWConfig,
        online: OnlineConfig | None = None,
    ) -> None:
        """Makes the optimizer, states included; ``rows`` samples go through the network at once."""
        backbone, transformer = adapters.backbone, adapters.transformer
        self.rows, self.adapters = rows, adapters
        execution = replace(execution, attention_backend=None, optimizer="adamw")
        self.trainee = Trainee(adapters, execution, lr=lr, adamw=adamw, seed=0)
        self.optimizer = self.trainee.optimizer
        self.planned = scenes_of(backbone, transformer, shape, rows)
        self.text = backbone.empty_text(transformer, rows, shape.text)
        policy = replace((online or online_defaults()).policy, num_inner_epochs=1, micro_batch_size=rows)
        self.online = replace(
            online or online_defaults(), window=SlidingWindow(2, size=1), tail_steps=None, group_size=max(rows, 2),
            own_noise=False, micro_batch_size=rows, policy=policy,
        )  # fmt: skip
        self.trainer = PolicyTrainer(list(adapters.parameters()), self.optimizer, policy, process_group=None)
        make_states(self.optimizer)

    @property
    def passes(self) -> int:
        """Passes with gradients in `once`: two where a group, which has two members at least, does not go through at once."""
        return self.online.group_size // self.rows

    def once(self) -> None:
        """Rollout, advantages, and the update."""
        device = self.trainee.device
        velocity = policy_velocity(self.trainee, self.planned, torch.zeros(1).long(), self.text.to(device))
        policy_step(
            self.trainer, velocity, self.planned.tokens[:1].to(device), (1.0, 0.5, 0.0), unequal_rewards, self.online,
            reference=self.adapters.disable,
        )  # fmt: skip


def unequal_rewards(latents: Tensor, index: Tensor) -> list[float]:
    """0 and 1 in turn, so that every group says who did better."""
    return [float(row % 2) for row in range(len(latents))]


class Evaluations(NamedTuple):
    """Samples times function evaluations: without gradients and with them."""

    forward: int
    backward: int


def iteration_evaluations(online: OnlineConfig, prompts: int) -> Evaluations:
    """What an iteration of stage 2 asks of the network, counted while `gspo.policy_step` takes it with a policy of one number.

    The window stands at its first place, where an iteration is dearest: no step before it is shared by a group. The second of two
    iterations is counted, because the first one also measures the clip range. Nobody is dropped (see `unequal_rewards`).
    """
    policy = nn.Parameter(torch.ones(()))
    trainer = PolicyTrainer([policy], torch.optim.SGD([policy], lr=1e-3), online.policy, process_group=None)
    counts = {False: 0, True: 0}

    def velocity(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        counts[torch.is_grad_enabled()] += len(x)
        return policy * x

    generator, steps = torch.Generator().manual_seed(0), online.window.num_steps
    starts = prompts * (online.group_size if online.own_noise else 1)
    for _ in range(2):
        counts.update({False: 0, True: 0})
        policy_step(
            trainer, velocity, torch.ones(starts, 1), torch.linspace(1, 0, steps + 1), unequal_rewards, online,
            generator=generator, reference=nullcontext,
        )  # fmt: skip
    return Evaluations(counts[False], counts[True])


def align_evaluations(config: AlignConfig) -> Evaluations:
    """What an iteration of stage 2 asks of the network: `iteration_evaluations` or those of a forward objective, and the drafts besides."""
    online = online_config(config)
    samples = config.prompts * online.group_size
    if config.objective == "ratio":
        counted = iteration_evaluations(online, config.prompts)
    else:
        levels = (config.nft if config.objective == "nft" else config.awm).levels.count
        counted = Evaluations(online.window.num_steps * samples, levels * online.policy.num_inner_epochs * samples)
    if config.separation is None or config.separation.mode != "draft":
        return counted
    starts = samples if online.own_noise else config.prompts
    return counted._replace(forward=counted.forward + config.separation.draft_steps * starts)


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
