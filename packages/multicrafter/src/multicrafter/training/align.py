"""Stage 2: preference. Online policy optimization of the stage-1 adapters (MultiCrafter, arXiv 2509.21953, section 3.4).

One iteration is `gspo.policy_step`. This file gives it what it asks for: the policy's velocity, the pictures' reward, the experts' routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gspo import OnlineConfig, PolicyTrainer, RobustReward, Rollout, Scores, StepReport, policy_step, share_groups
from gspo.rollout import VelocityFunction
from moe_lora.replay import RouteRecord, record, replay
from torch import Tensor

from multicrafter import UserError, user_input
from multicrafter.models.adapters import Adapters
from multicrafter.models.flux.model import Text
from multicrafter.models.loaded import LoadedModel
from multicrafter.training.align_config import AlignConfig as AlignConfig
from multicrafter.training.checkpoint import Section
from multicrafter.training.distributed import active, all_sum, rank, world_size
from multicrafter.training.encoding_cache import CachedText
from multicrafter.training.optimization import learning_rate
from multicrafter.training.previews import Preview, make_preview, row_of
from multicrafter.training.rewarding import Reward
from multicrafter.training.scenes import Buckets, EncodedScenes
from multicrafter.training.trainee import Trainee

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def online_config(config: AlignConfig) -> OnlineConfig:
    """``config.online`` as this run needs it: one batch for all ranks, of which a broken velocity costs a step and no more."""
    policy = replace(config.online.policy, on_nonfinite="skip")
    if config.execution.parallel == "fsdp" and active():
        # a sharded model averages gradients in its backward, and needs the same passes on every rank
        policy = replace(policy, reduce_gradients=False, drop_zero_variance=False)
    return replace(config.online, policy=policy, split_batch=True, micro_batch_size=config.micro_batch)


def policy_velocity(
    trainee: Trainee, scenes: EncodedScenes, rows: Tensor, text: Text, *, first: int = 0, guidance: float = 1.0
) -> VelocityFunction:
    """The policy as gspo asks for it: (latents, sigma, index into ``rows``) -> velocity in fp32.

    Args:
        trainee: Whose model it is.
        scenes: Where the references are.
        rows: The scenes of a batch.
        text: Encoded prompts of some of them, in their order.
        first: Which of ``rows`` the first of these prompts belongs to.
        guidance: Of a base that takes it as an input.
    """

    def velocity_fn(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        context = scenes.context(rows[index.cpu()], x.device)
        return trainee.predict(x, sigma, text.rows(index - first), guidance=guidance, **context)

    return velocity_fn


class Align:
    """Stage 2 as a `loop.Stage`, on one process or many."""

    def __init__(
        self,
        model: LoadedModel | DiffusionPipeline,
        adapters: Adapters,
        config: AlignConfig,
        scenes: EncodedScenes | Sequence[EncodedScenes],
        reward: Reward,
    ) -> None:
        """Trains ``adapters``, which sit on the model's transformer; only prompts and references of ``scenes`` are used.

        Several `EncodedScenes` are buckets of different layouts: an iteration draws all its pictures in that of one bucket.

        Raises:
            ValueError: Experts are to be replayed that there are not, or the batch does not spread evenly over the ranks.
        """
        if adapters.experts is None and (config.routing_replay or config.routing_jitter):
            raise UserError("routing_replay and routing_jitter need an adapter with experts, got a plain one")
        self.config, self.buckets, self.model, self.adapters = config, Buckets(scenes), LoadedModel.of(model), adapters
        self.scenes = self.buckets.buckets[0]  # the bucket of the present iteration
        self.online = online_config(config)
        with user_input():
            self.share = share_groups(config.prompts, self.online.group_size, rank=rank(), num_ranks=world_size())
        cache = config.execution.cache
        self.text = CachedText(self.model, self.buckets.captions, cache) if cache else None
        self.trainee = Trainee(
            adapters, config.execution, lr=config.lr, adamw=config.adamw, seed=self.online.seed, sync_in_backward=False
        )
        self.optimizer, self.generator = self.trainee.optimizer, self.trainee.generator
        self.trainer = PolicyTrainer(list(adapters.parameters()), self.optimizer, self.online.policy)
        self.reference_pictures = {
            id(bucket): [list(pictures) for pictures in bucket.reference_images] for bucket in self.buckets.buckets
        }
        self.reward = RobustReward(_single(reward), retries=config.reward_retries, wait_s=config.reward_wait_s)
        self.routes: dict[int, RouteRecord] = {}
        self.last_pictures: Tensor | None = None

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of a rollout, which depend on the size of the pictures where the schedule is shifted by it."""
        return self.model.sigmas(self.online.window.num_steps, self.scenes.tokens.shape[1])

    @torch.no_grad()
    def encode(self, rows: Tensor) -> Text:
        """The prompts of the scenes ``rows``."""
        if self.text is None or self.scenes.text is not None:
            text = self.scenes.encode_text(self.model, rows)
        else:
            text = self.text([self.scenes.captions[r] for r in rows.tolist()])
        return text.to(self.trainee.device)

    def velocity(self, rows: Tensor) -> VelocityFunction:
        """The policy for a whole batch of scenes ``rows``, of which this rank encodes its own prompts."""
        here = self.share.prompts
        text = self.encode(rows[here])
        return policy_velocity(self.trainee, self.scenes, rows, text, first=here.start, guidance=self.config.guidance)

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of this rank in parts that go through a model at once."""
        parts: tuple[Tensor, ...] = rows.split(self.online.micro_batch_size or len(rows))
        return parts

    @torch.no_grad()
    def score(self, latents: Tensor, members: Sequence[int]) -> Any:
        """Rewards of finished latents, which belong to the scenes ``members``."""
        decoded = [self.model.decode_pictures(part, self.scenes.grid) for part in self.parts(latents)]
        self.last_pictures = torch.cat(decoded)
        captions = [self.scenes.captions[r] for r in members]
        references = self.reference_pictures[id(self.scenes)]
        return self.reward(list(self.last_pictures), captions, [references[r] for r in members])

    def step(self, index: int) -> dict[str, float]:
        """One iteration: rollout, reward, advantages, update."""
        config, replayed, failed = self.config, self.config.routing_replay, self.reward.num_failed
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.lr, index, config.num_steps)
        self.scenes = self.buckets.draw(self.generator)
        rows = torch.randint(len(self.scenes), (config.prompts,), generator=self.generator)
        noise = torch.randn(len(rows), *self.scenes.tokens.shape[1:], generator=self.generator)
        velocity = self.velocity(rows)
        report = policy_step(
            self.trainer, velocity, noise.to(self.trainee.device), self.sigmas,
            lambda latents, index: self.score(latents, rows[index.cpu()].tolist()), self.online, iteration=index,
            generator=self.generator, reference=self.adapters.disable,
            record=self._record if replayed or config.routing_jitter else None, replay=self._replay if replayed else None,
        )  # fmt: skip
        self.trainee.samples_seen += self.share.num_samples
        if not report.update.skipped:
            self.trainee.update_ema()
        metrics = _metrics(report, failed=self.reward.num_failed - failed)
        if config.routing_jitter:
            metrics["routing_jitter"] = self._jitter(velocity, report.rollout)
        self.routes = {}
        return metrics

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
    def _jitter(self, velocity: VelocityFunction, drawn: Rollout) -> float:
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

    def preview(self) -> Preview:
        """Attention and routing on the first prompts, and the pictures drawn last."""
        self.scenes = self.buckets.buckets[0]
        rows = torch.arange(min(3, len(self.scenes)))
        drawn = make_preview(self.trainee, self.scenes, self.encode(rows), rows)
        if self.last_pictures is None:
            return drawn
        shown = [p.float().cpu() for p in self.last_pictures[: min(8, self.share.num_members)]]
        return Preview({**drawn.pictures, "group": row_of(shown, size=shown[0].shape[-2])}, drawn.metrics)

    def tensors(self) -> dict[str, Tensor]:
        """Adapters, optimizer, moving average, generator, clip range."""
        trainer = {f"trainer.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.trainer.state_dict().items()}
        return {**self.trainee.tensors(), **trainer, "failed_rewards": torch.tensor(self.reward.num_failed)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`."""
        self.trainee.restore(tensors)
        self.trainer.load_state_dict({k: float(v) for k, v in Section(tensors, "trainer.").items()})
        self.reward.num_failed = int(tensors["failed_rewards"])

    def notes(self) -> dict[str, Any]:
        """What a checkpoint says about it: besides `Trainee.notes` the window's schedule."""
        return {
            "stage": 2,
            "window": asdict(self.online.window),
            "clip_range": self.trainer.clip_range,
            **self.trainee.notes(),
        }

    def check_notes(self, notes: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another stage, window or adapter."""
        if notes.get("stage", 2) != 2:
            raise UserError(f"checkpoint must be of stage 2, got stage {notes['stage']}")
        if notes.get("window", asdict(self.online.window)) != asdict(self.online.window):
            raise UserError(f"checkpoint must have the window {asdict(self.online.window)}, got {notes['window']}")
        self.trainee.check_notes(notes)


def _single(reward: Reward) -> Callable[..., Scores]:
    """Totals in single precision, as everything that advantages are made of."""

    def score(*columns: Sequence[Any]) -> Scores:
        found = reward(*columns)
        return Scores(np.asarray(found.totals, np.float32), found.parts)

    return score


def _metrics(report: StepReport, *, failed: int) -> dict[str, float]:
    """What `gspo.policy_step` says over all ranks' samples, and which pictures no reward could score."""
    found, update = report.summary(), report.update
    # without a signal (all rewards of each group equal) nothing is wrong: only what is not finite counts as skipped
    broken = report.broken_velocities > 0 or math.isnan(found["reward"])
    return {
        **found,
        "ratio_spread": found.pop("ratio_std"),
        "window": float(report.window[0]),
        "reward_failures": float(all_sum(torch.tensor(float(failed)))),
        "skipped": float(broken or (update.skipped and update.num_samples > 0)),
    }
