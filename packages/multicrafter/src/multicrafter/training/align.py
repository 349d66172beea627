"""Stage 2: preference. Online policy optimization of the stage-1 adapters (MultiCrafter, arXiv 2509.21953, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gspo import FlowCPS, FlowSDE, PolicyConfig, PolicyTrainer, Rollout, SlidingWindow, group_advantages, rollout
from gspo.sde import Kernel
from gspo.step import UpdateStatistics
from moe_lora.replay import RouteRecord, record, replay
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import backbone_of
from multicrafter.models.checks import check_finite
from multicrafter.models.flux.model import Text
from multicrafter.training.checkpoint import Section
from multicrafter.training.distributed import (
    active,
    all_sum,
    any_rank,
    gather_objects,
    gather_rows,
    my_groups,
    world_size,
)
from multicrafter.training.encoding_cache import CachedText
from multicrafter.training.loop import LoopConfig
from multicrafter.training.noise import SlicedNoise
from multicrafter.training.optimization import AdamWConfig, ScheduleConfig, learning_rate
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.previews import Look, look_at, row_of
from multicrafter.training.rewarding import Reward, Scored, score_pictures
from multicrafter.training.scenes import EncodedScenes
from multicrafter.training.trainee import Trainee
from multicrafter.world.rewards import RewardConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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
        guidance: Of a base that takes it as an input: what rollouts are sampled, and the policy is trained, at.
        lr: Peak learning rate.
        schedule: How it rises and falls.
        adamw: The rest of the optimizer; gradients are clipped to ``policy.max_grad_norm``.
        seed: Of prompt order, noise and rollouts.
        policy: Ratio, clipping, KL, inner epochs.
        reward: Weights.
        routing_replay: Experts that the rollout chose are chosen again in the update (their weights are still the router's, and learn).
        routing_jitter: Measure after every update, in one more pass, which share of the tokens the policy would route otherwise now.
        reward_retries: More attempts where the reward raises, before the pictures that cause it are left out.
        reward_wait_s: Seconds before the first of them, doubled with each.
        execution: Precision, memory, processes.
        loop: How often checkpoints and pictures are written, and when to give up.
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
    guidance: float = 2.5
    lr: float = 3e-4
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_steps=5, decay="constant"))
    adamw: AdamWConfig = field(default_factory=lambda: AdamWConfig(betas=(0.9, 0.99)))
    seed: int = 0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    routing_replay: bool = False
    routing_jitter: bool = False
    reward_retries: int = 2
    reward_wait_s: float = 1.0
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(save_every=10, best="reward", best_is="highest", picture_every=10)
    )

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("num_steps", "prompts", "window_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise UserError(f"group_size must be at least 2, got {self.group_size}")
        if self.lr <= 0:
            raise UserError(f"lr must be positive, got {self.lr}")
        if self.guidance < 1:
            raise UserError(f"guidance must be at least 1, got {self.guidance}")
        for name in ("reward_retries", "reward_wait_s"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.routing_replay and self.execution.gradient_checkpointing:
            raise UserError("routing_replay needs execution.gradient_checkpointing to be off, got both")
        if self.kernel not in KERNELS:
            raise UserError(f"kernel must be one of {tuple(KERNELS)}, got {self.kernel!r}")
        self.window()

    def window(self) -> SlidingWindow:
        """The window's schedule."""
        return SlidingWindow(self.num_sampling_steps, size=self.window_size, interval=self.window_interval)

    def make_kernel(self) -> Kernel:
        """The stochastic step."""
        return KERNELS[self.kernel](noise_level=self.noise_level)


class Align:
    """Stage 2 as a `loop.Stage`, on one process or many: groups of rollouts are spread over the ranks (`multicrafter.training.distributed`)."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        adapters: Adapters,
        config: AlignConfig,
        scenes: EncodedScenes,
        reward: Reward,
    ) -> None:
        """Trains ``adapters``, which sit on the pipeline's transformer; only prompts and references of ``scenes`` are used."""
        self.config, self.scenes, self.reward, self.pipe, self.adapters = config, scenes, reward, pipe, adapters
        self.kernel, self.window = config.make_kernel(), config.window()
        self.share = my_groups(config.prompts, config.group_size)
        self.backbone = backbone_of(pipe)
        cache = config.execution.cache
        self.text = CachedText(pipe, scenes.captions, cache, backbone=self.backbone) if cache else None
        sharded = config.execution.parallel == "fsdp" and active()
        self.trainee = Trainee(
            adapters, config.execution, lr=config.lr, adamw=config.adamw, seed=config.seed, sync_in_backward=False
        )
        self.optimizer, self.generator = self.trainee.optimizer, self.trainee.generator
        # a sharded model averages gradients in its backward, and needs the same passes on every rank
        policy = replace(config.policy, reduce_gradients=False, drop_zero_variance=False) if sharded else config.policy
        self.trainer = PolicyTrainer(list(adapters.parameters()), self.optimizer, policy)
        self.sigmas = self.backbone.sigmas(pipe, config.num_sampling_steps, scenes.tokens.shape[1])
        self.reference_pictures = [list(pictures) for pictures in scenes.reference_images]
        self.broken_velocities, self.failed_rewards = 0, 0
        if adapters.experts is None and (config.routing_replay or config.routing_jitter):
            raise UserError("routing_replay and routing_jitter need an adapter with experts, got a plain one")
        self.routes: dict[int, RouteRecord] = {}
        self.last_pictures: Tensor | None = None

    @torch.no_grad()
    def encode(self, rows: Tensor) -> Text:
        """The prompts ``rows``."""
        if self.text is None or self.scenes.text is not None:
            text = self.scenes.encode_text(self.pipe, self.backbone, rows)
        else:
            text = self.text([self.scenes.captions[r] for r in rows.tolist()])
        return text.to(self.trainee.device)

    def velocity(self, rows: Tensor, text: Text | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The policy for the prompts ``rows``: (latents, sigma, index into rows) -> velocity in fp32.

        What is not finite becomes 0 and is counted: the step is skipped on all ranks, instead of one of them failing alone.
        """
        known = self.encode(rows) if text is None else text

        def velocity_fn(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
            context = self.scenes.context(rows[index.cpu()], x.device)
            velocity = self.trainee.predict(x, sigma, known.rows(index), guidance=self.config.guidance, **context)
            finite = torch.isfinite(velocity)
            if not bool(finite.all()):
                self.broken_velocities += 1
                velocity = torch.where(finite, velocity, torch.zeros_like(velocity))
            return velocity

        return velocity_fn

    def rollout(self, rows: Tensor, iteration: int, text: Text | None = None) -> Rollout:
        """This rank's samples of the current policy for the prompts ``rows`` of the whole batch."""
        config, share, device = self.config, self.share, self.trainee.device
        noise = torch.randn(len(rows), *self.scenes.tokens.shape[1:], generator=self.generator)
        kernel: Kernel = self.kernel
        if active() or device.type != "cpu":
            kernel = SlicedNoise(kernel, share.rows(config.group_size), config.prompts * config.group_size)
        return rollout(
            self.velocity(rows[share.prompts], text), noise[share.prompts].to(device), self.sigmas, kernel=kernel,
            window=self.window.at(iteration), group_size=share.group_size, generator=self.generator, tail_steps=config.tail_steps,
            micro_batch_size=config.execution.micro_batch,
            record=self._record if config.routing_replay or config.routing_jitter else None,
        )  # fmt: skip

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of this rank in parts that go through a model at once."""
        parts: tuple[Tensor, ...] = rows.split(self.config.execution.micro_batch or len(rows))
        return parts

    @contextmanager
    def _record(self, position: int, rows: Tensor) -> Iterator[None]:
        """Notes which experts a step of the window takes, for these rows of the rollout after those noted before."""
        assert self.adapters.experts is not None
        with record(self.adapters.experts) as kept:
            yield
        self.routes[position] = RouteRecord.joined([self.routes[position], kept]) if rows[0] else kept

    def _replay(self, position: int, rows: Tensor) -> AbstractContextManager[None]:
        """Takes them again."""
        assert self.adapters.experts is not None
        return replay(self.adapters.experts, self.routes[position].rows(rows.cpu()))

    @torch.no_grad()
    def _jitter(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor], drawn: Rollout) -> float:
        """Share of (token, layer) at the first step of the window whose experts the policy would choose otherwise now (all ranks)."""
        assert self.adapters.experts is not None
        step, parts = drawn.trajectory[0], []
        x = step.latents.to(drawn.latents.device)
        for rows in self.parts(torch.arange(len(x), device=x.device)):
            with record(self.adapters.experts) as kept:
                velocity(x[rows], torch.full((len(rows),), step.sigma, device=x.device), drawn.index[rows])
            parts.append(kept)
        now = RouteRecord.joined(parts)
        pairs = [(a[0], b[0]) for a, b in zip(self.routes[0].choices.values(), now.choices.values(), strict=True)]
        moved = sum(float((a != b).any(-1).sum()) for a, b in pairs)
        moved, count = all_sum(
            torch.tensor([moved, sum(a[..., 0].numel() for a, _ in pairs)], dtype=torch.float64)
        ).tolist()
        return float(moved / count)

    def step(self, index: int) -> dict[str, float]:
        """One iteration: rollout, reward, advantages, update."""
        config, share = self.config, self.share
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.lr, index, config.num_steps)
        rows = torch.randint(len(self.scenes), (config.prompts,), generator=self.generator)
        mine = rows[share.prompts]
        text = self.encode(mine)
        self.broken_velocities = 0
        drawn = self.rollout(rows, index, text)
        with torch.no_grad():
            decoded = [
                self.backbone.decode_pictures(self.pipe, part, self.scenes.grid) for part in self.parts(drawn.latents)
            ]
            pictures = torch.cat(decoded)
        self.last_pictures = pictures
        members = mine[drawn.index.cpu()].tolist()
        score = score_pictures(
            self.reward,
            list(pictures),
            [self.scenes.captions[r] for r in members],
            [self.reference_pictures[r] for r in members],
            retries=config.reward_retries,
            wait_s=config.reward_wait_s,
        )
        self.failed_rewards += score.failed
        rewards = torch.from_numpy(score.totals).float().to(drawn.latents.device)
        self.trainee.samples_seen += config.prompts * config.group_size
        statistics = None
        if not any_rank(self.broken_velocities > 0):
            advantages = group_advantages(rewards, drawn.index + share.prompts.start)
            statistics = self.trainer.update(
                self.velocity(mine, text),
                drawn,
                advantages,
                self.kernel,
                reference=self.adapters.disable,
                replay=self._replay if config.routing_replay else None,
            )
            if not statistics.skipped:
                self.trainee.update_ema()
        metrics = self._metrics(index, rewards, score, statistics)
        if config.routing_jitter:
            metrics["routing_jitter"] = self._jitter(self.velocity(mine, text), drawn)
        self.routes = {}
        return metrics

    def _metrics(
        self, index: int, rewards: Tensor, score: Scored, statistics: UpdateStatistics | None
    ) -> dict[str, float]:
        """Rewards over all ranks' samples, and what the update did."""
        config, ranks = self.config, world_size()
        where, count = self.share.rows(config.group_size), config.prompts * config.group_size
        totals = gather_rows(rewards, where, count)
        names = sorted({name for found in gather_objects(list(score.parts)) for name in found})
        nothing = np.full(len(rewards), np.nan)
        parts = {name: gather_rows(torch.from_numpy(score.parts.get(name, nothing)), where, count) for name in names}
        failed = sum(gather_objects(score.failed))
        finite = totals[torch.isfinite(totals)]
        local = [0.0] * 4
        if statistics is not None:
            clipped, ratio = statistics.surrogate.clip_fraction, statistics.surrogate
            local = [
                statistics.kl,
                float(clipped) / ranks,
                float(ratio.ratio_std) / ranks,
                float(ratio.approx_kl) / ranks,
            ]
        kl, clip_fraction, ratio_spread, approx_kl = all_sum(torch.tensor(local, dtype=torch.float64)).tolist()
        # without a signal (all rewards of each group equal) nothing is wrong: only what is not finite counts as skipped
        skipped = statistics is None or (statistics.skipped and statistics.num_samples > 0) or not len(finite)
        return {
            "reward": float(finite.mean()) if len(finite) else float("nan"),
            "reward_spread": float(totals.unflatten(0, (-1, config.group_size)).std(1).nanmean()),
            **{f"reward_{name}": float(values.nanmean()) for name, values in parts.items()},
            "clip_fraction": clip_fraction,
            "ratio_spread": ratio_spread,
            "approx_kl": approx_kl,
            "clip_range": 0.0 if statistics is None else statistics.clip_range,
            "kl": kl,
            "grad_norm": float("nan") if statistics is None else statistics.grad_norm,
            "window": float(self.window.at(index)[0]),
            "reward_failures": float(failed),
            "skipped": float(skipped),
        }

    def look(self) -> Look:
        """Attention and routing on the first prompts, and the pictures drawn last."""
        rows = torch.arange(min(3, len(self.scenes)))
        look = look_at(self.trainee, self.scenes, self.encode(rows), rows)
        if self.last_pictures is None:
            return look
        shown = [p.float().cpu() for p in self.last_pictures[: min(8, self.share.group_size)]]
        return Look({**look.pictures, "group": row_of(shown, size=shown[0].shape[-1])}, look.metrics)

    def tensors(self) -> dict[str, Tensor]:
        """Adapters, optimizer, moving average, generator, clip range."""
        trainer = {f"trainer.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.trainer.state_dict().items()}
        return {**self.trainee.tensors(), **trainer, "failed_rewards": torch.tensor(self.failed_rewards)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`."""
        self.trainee.restore(tensors)
        self.trainer.load_state_dict({k: float(v) for k, v in Section(tensors, "trainer.").items()})
        self.failed_rewards = int(tensors["failed_rewards"])

    def notes(self) -> dict[str, Any]:
        """What a checkpoint says about it: besides `Trainee.notes` the window's schedule."""
        return {
            "stage": 2,
            "window": asdict(self.window),
            "clip_range": self.trainer.clip_range,
            **self.trainee.notes(),
        }

    def check_notes(self, notes: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another stage, window or adapter."""
        if notes.get("stage", 2) != 2:
            raise UserError(f"checkpoint must be of stage 2, got stage {notes['stage']}")
        if notes.get("window", asdict(self.window)) != asdict(self.window):
            raise UserError(f"checkpoint must have the window {asdict(self.window)}, got {notes['window']}")
        self.trainee.check_notes(notes)
