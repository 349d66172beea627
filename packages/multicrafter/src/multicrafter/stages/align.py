"""Stage 2: preference. Online policy optimization of the stage-1 adapters (MultiCrafter, arXiv 2509.21953, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from gspo import FlowCPS, FlowSDE, PolicyConfig, PolicyTrainer, Rollout, SlidingWindow, group_advantages, rollout
from gspo.sde import Kernel
from id_reward import CompositeReward
from torch import Tensor

from multicrafter.adapters import Adapters
from multicrafter.backbones import backbone_of
from multicrafter.loop import optimizer_tensors, restore_optimizer
from multicrafter.rewards import RewardConfig
from multicrafter.stages.data import EncodedScenes

if TYPE_CHECKING:
    from diffusers import FluxPipeline

KERNELS = {"flow_sde": FlowSDE, "flow_cps": FlowCPS}


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Stage 2.

    Attributes:
        num_steps: Iterations; each draws a rollout and updates on it.
        prompts: Prompts (with their references) an iteration.
        group_size: Samples a prompt.
        num_sampling_steps: Denoising steps of a rollout.
        window_size: Stochastic, trained steps.
        window_interval: Iterations between moves of the window (tau).
        tail_steps: Second-order steps after the window in place of the remaining Euler steps; None keeps these.
        kernel: "flow_sde" or "flow_cps".
        noise_level: Of the kernel.
        lr: Learning rate, constant after a warm-up of 5 iterations.
        seed: Of prompt order, noise and rollouts.
        policy: Ratio, clipping, KL, inner epochs.
        reward: Weights.
    """

    num_steps: int = 40
    prompts: int = 8
    group_size: int = 8
    num_sampling_steps: int = 16
    window_size: int = 2
    window_interval: int = 4
    tail_steps: int | None = 5
    kernel: str = "flow_sde"
    noise_level: float = 0.7
    lr: float = 3e-4
    seed: int = 0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        for name in ("num_steps", "prompts", "window_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {self.group_size}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {tuple(KERNELS)}, got {self.kernel!r}")
        self.window()

    def window(self) -> SlidingWindow:
        """The window's schedule."""
        return SlidingWindow(self.num_sampling_steps, size=self.window_size, interval=self.window_interval)

    def make_kernel(self) -> Kernel:
        """The stochastic step."""
        return KERNELS[self.kernel](noise_level=self.noise_level)


class Align:
    """Stage 2 as a `loop.Stage`."""

    def __init__(
        self,
        pipe: FluxPipeline,
        adapters: Adapters,
        config: AlignConfig,
        scenes: EncodedScenes,
        reward: CompositeReward,
    ) -> None:
        """Trains ``adapters``, which sit on the pipeline's transformer; only prompts and references of ``scenes`` are used."""
        self.config, self.scenes, self.reward, self.pipe, self.adapters = config, scenes, reward, pipe, adapters
        self.kernel, self.window = config.make_kernel(), config.window()
        self.optimizer = torch.optim.AdamW(adapters.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.trainer = PolicyTrainer(list(adapters.parameters()), self.optimizer, config.policy)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.backbone = backbone_of(pipe)
        self.sigmas = self.backbone.sigmas(pipe, config.num_sampling_steps, scenes.tokens.shape[1])
        self.reference_pictures = [list(pictures) for pictures in scenes.reference_images]

    def velocity(self, rows: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The policy for the prompts ``rows``: (latents, sigma, index into rows) -> velocity."""
        with torch.no_grad():
            text = self.backbone.encode_prompts(self.pipe, [self.scenes.captions[r] for r in rows.tolist()])

        def velocity_fn(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
            context = self.scenes.context(rows[index])
            return self.backbone.velocity(self.pipe.transformer, x, sigma, text[index], **context)

        return velocity_fn

    def rollout(self, rows: Tensor, iteration: int) -> Rollout:
        """Samples of the current policy for the prompts ``rows``."""
        noise = torch.randn(len(rows), *self.scenes.tokens.shape[1:], generator=self.generator)
        return rollout(
            self.velocity(rows), noise, self.sigmas, kernel=self.kernel, window=self.window.at(iteration),
            group_size=self.config.group_size, generator=self.generator, tail_steps=self.config.tail_steps,
        )  # fmt: skip

    def step(self, index: int) -> dict[str, float]:
        """One iteration: rollout, reward, advantages, update."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (index + 1) / 5)
        rows = torch.randint(len(self.scenes), (config.prompts,), generator=self.generator)
        drawn = self.rollout(rows, index)
        with torch.no_grad():
            pictures = self.backbone.decode_pictures(self.pipe, drawn.latents, self.scenes.grid)
        members = rows[drawn.index].tolist()
        score = self.reward(
            list(pictures), [self.scenes.captions[r] for r in members], [self.reference_pictures[r] for r in members]
        )
        rewards = torch.from_numpy(score.totals).float()
        advantages = group_advantages(rewards, drawn.index)
        statistics = self.trainer.update(
            self.velocity(rows), drawn, advantages, self.kernel, reference=self.adapters.disable
        )
        finite = rewards[torch.isfinite(rewards)]
        return {
            "reward": float(finite.mean()) if len(finite) else float("nan"),
            "reward_spread": float(rewards.unflatten(0, (-1, config.group_size)).std(1).nanmean()),
            **{f"reward_{name}": float(torch.from_numpy(values).nanmean()) for name, values in score.parts.items()},
            "clip_fraction": float(statistics.surrogate.clip_fraction),
            "clip_range": statistics.clip_range,
            "kl": statistics.kl,
            "grad_norm": statistics.grad_norm,
            "window": float(self.window.at(index)[0]),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Adapters, optimizer, generator, clip range."""
        return {
            **{f"adapters.{k}": v for k, v in self.adapters.state_dict().items()},
            **optimizer_tensors(self.optimizer),
            **{f"trainer.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.trainer.state_dict().items()},
            "generator": self.generator.get_state(),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores `tensors`."""
        self.adapters.load_state_dict(
            {k.removeprefix("adapters."): v for k, v in tensors.items() if k.startswith("adapters.")}
        )
        restore_optimizer(self.optimizer, tensors)
        self.trainer.load_state_dict(
            {k.removeprefix("trainer."): float(v) for k, v in tensors.items() if k.startswith("trainer.")}
        )
        self.generator.set_state(tensors["generator"])
