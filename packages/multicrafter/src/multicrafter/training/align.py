"""Stage 2: preference. Online policy optimization of the stage-1 adapters (MultiCrafter, arXiv 2509.21953, section 3.4).

One iteration is `gspo.policy_step`, or `gspo.objective_step` where no likelihood is needed. This file gives them what they ask for: the
policy's velocity, the pictures' reward, the experts' routes, and where the subjects are that are kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gspo import (
    ObjectiveConfig,
    ObjectiveReport,
    ObjectiveTrainer,
    OnlineConfig,
    PolicyTrainer,
    RobustReward,
    Rollout,
    Scores,
    SignalLog,
    SlidingWindow,
    StepReport,
    objective_step,
    policy_step,
    share_groups,
)
from gspo.rollout import VelocityFunction
from idar import owner_masks
from moe_lora.replay import RouteRecord, record, replay
from torch import Tensor

from multicrafter import UserError, user_input
from multicrafter.models.adapters import Adapters
from multicrafter.models.binding import BindingConfig, bind_by_draft, separable
from multicrafter.models.finding import Finder, MapFinder
from multicrafter.models.flux.model import Text
from multicrafter.models.loaded import LoadedModel
from multicrafter.training.align_config import AlignConfig as AlignConfig
from multicrafter.training.checkpoint import Section
from multicrafter.training.distributed import active, all_sum, rank, world_size
from multicrafter.training.encoding_cache import CachedText, rest_encoders
from multicrafter.training.optimization import learning_rate
from multicrafter.training.precision import prepare_transformer
from multicrafter.training.previews import Preview, make_preview, row_of
from multicrafter.training.rewarding import Reward
from multicrafter.training.scenes import Buckets, EncodedScenes
from multicrafter.training.trainee import Trainee
from multicrafter.training.watching import Watch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def online_config(config: AlignConfig) -> OnlineConfig:
    """``config.online`` as this run needs it: one batch for all ranks, of which a broken velocity costs a step and no more."""
    policy = replace(config.online.policy, on_nonfinite="skip")
    if config.execution.parallel == "fsdp" and active():
        # a sharded model averages gradients in its backward, and needs the same passes on every rank
        policy = replace(policy, reduce_gradients=False, drop_zero_variance=False)
    weights = config.online.reward_weights
    if config.reward_normalization == "each" and not weights:
        weights = config.reward.weights
    return replace(
        config.online, policy=policy, split_batch=True, micro_batch_size=config.micro_batch, reward_weights=weights
    )


Watcher = Callable[[Sequence[Any], Sequence[str], Sequence[Sequence[Any]]], Any]
"""``(pictures, prompts, references) -> (b,)``: a judge whose scores are not trained on."""


def policy_velocity(
    trainee: Trainee,
    scenes: EncodedScenes,
    rows: Tensor,
    text: Text,
    *,
    first: int = 0,
    guidance: float = 1.0,
    members: int = 1,
    separate: Callable[[Tensor], None] | None = None,
) -> VelocityFunction:
    """The policy as gspo asks for it: (latents, sigma, start) -> velocity in fp32. A start is a row of the batch's noise.

    Args:
        trainee: Whose model it is.
        scenes: Where the references are.
        rows: The scenes of a batch, one per prompt.
        text: Encoded prompts of some of them, in their order.
        first: Which of ``rows`` the first of these prompts belongs to.
        guidance: Of a base that takes it as an input.
        members: Starts of a prompt: 1, or with ``own_noise`` one for every member of its group.
        separate: Called with the starts before each pass.
    """

    def velocity_fn(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        prompt = index // members
        context = scenes.context(rows[prompt.cpu()], x.device)
        if separate is not None:
            separate(index)
        return trainee.predict(x, sigma, text.rows(prompt - first), guidance=guidance, **context)

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
        *,
        finder: Finder | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Trains ``adapters``, which sit on the model's transformer; only prompts and references of ``scenes`` are used.

        Args:
            model: The base.
            adapters: On its transformer.
            config: See `AlignConfig`.
            scenes: Prompts and references; several `EncodedScenes` are buckets of different layouts: an iteration draws all its pictures in
                that of one bucket.
            reward: What is maximised.
            finder: Finds subjects in drafts, for ``separation``; the attention of the drafts by default.
            watcher: Judge for ``watch``.

        Raises:
            ValueError: Experts are to be replayed that there are not, a judge is missing that is to watch, or the batch does not spread
                evenly over the ranks.
        """
        if adapters.experts is None and (config.routing_replay or config.routing_jitter):
            raise UserError("routing_replay and routing_jitter need an adapter with experts, got a plain one")
        if config.watch.action != "none" and watcher is None:
            raise UserError(f"watcher must be given for watch.action {config.watch.action!r}, got none")
        self.config, self.buckets, self.model, self.adapters = config, Buckets(scenes), LoadedModel.of(model), adapters
        self.scenes = self.buckets.buckets[0]  # the bucket of the present iteration
        self.online = online_config(config)
        with user_input():
            self.share = share_groups(config.prompts, self.online.group_size, rank=rank(), num_ranks=world_size())
        if config.objective != "ratio" and self.share.num_members != self.online.group_size:
            raise UserError(
                f"prompts must be a multiple of the {world_size()} processes for objective {config.objective!r}, got {config.prompts}"
            )
        self.members = self.online.group_size if self.online.own_noise else 1
        prompts = torch.arange(self.share.prompts.start, self.share.prompts.stop)
        self.starts = self.share.rows() if self.online.own_noise else prompts
        cache = config.execution.cache
        self.text = CachedText(self.model, self.buckets.captions, cache) if cache else None
        rest_encoders(self.model)
        prepare_transformer(
            self.model.transformer, config.execution, device=self.model.device, keep=adapters.parameters()
        )
        self.trainee = Trainee(
            adapters, config.execution, lr=config.lr, adamw=config.adamw, seed=self.online.seed, sync_in_backward=False
        )
        self.optimizer, self.generator = self.trainee.optimizer, self.trainee.generator
        self.trainer = self._make_trainer()
        self.signal = SignalLog(momentum=config.adamw.betas[0])
        self.reference_pictures = {id(bucket): bucket.subject_pictures() for bucket in self.buckets.buckets}
        by_name = config.reward_normalization == "each"
        self.reward = RobustReward(_single(reward, by_name), retries=config.reward_retries, wait_s=config.reward_wait_s)
        self.finder, self.watcher, self.watch = finder or MapFinder(), watcher, Watch(config.watch)
        self.masks: Tensor | None = None
        self.separation: Any = None
        self.routes: dict[int, RouteRecord] = {}
        self.last_pictures: Tensor | None = None
        self.last_scenes: list[int] = []

    def _make_trainer(self) -> PolicyTrainer | ObjectiveTrainer:
        """By the objective."""
        config, policy, parameters = self.config, self.online.policy, list(self.adapters.parameters())
        if config.objective == "ratio":
            return PolicyTrainer(parameters, self.optimizer, policy)
        settings = ObjectiveConfig(
            num_inner_epochs=policy.num_inner_epochs, kl_coef=policy.kl_coef, max_grad_norm=policy.max_grad_norm,
            micro_batch_size=policy.micro_batch_size or config.micro_batch, drop_silent_rows=policy.drop_zero_variance,
            reduce_gradients=policy.reduce_gradients, seed=self.online.seed + 1_000_003 * rank(),
        )  # fmt: skip
        objective = config.nft if config.objective == "nft" else config.awm
        return ObjectiveTrainer(parameters, self.optimizer, objective, settings)

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of a rollout, which depend on the size of the pictures where the schedule is shifted by it."""
        return self.model.sigmas(self.online.window.num_steps, self.scenes.tokens.shape[1])

    def references_of(self, rows: Sequence[int]) -> list[list[Tensor]]:
        """One reference picture of every subject of some of the bucket's scenes."""
        known = self.reference_pictures[id(self.scenes)]
        return [known[r] for r in rows]

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
        place = torch.zeros(len(rows) * self.members, dtype=torch.long)
        place[self.starts] = torch.arange(len(self.starts))

        def separate(index: Tensor) -> None:
            if self.separation is not None and self._binds:
                self.separation.masks = None if self.masks is None else self.masks[place[index.cpu()].to(index.device)]

        return policy_velocity(
            self.trainee, self.scenes, rows, self.encode(rows[here]), first=here.start, guidance=self.config.guidance,
            members=self.members, separate=separate,
        )  # fmt: skip

    @property
    def _binds(self) -> bool:
        """Whether subjects are kept apart by masks that belong to starts."""
        return self.config.separation is not None and self.config.separation.mode in ("draft", "masks")

    @contextmanager
    def separated(self) -> Iterator[None]:
        """Inside, attention is separated as the configuration says; places are those of the last `bind`."""
        scenes, config = self.scenes, self.config.separation or BindingConfig()
        with separable(
            self.adapters.transformer,
            self.model.backbone,
            scenes.grid,
            scenes.reference_grids,
            config,
            counts=scenes.counts,
        ) as self.separation:
            try:
                yield
            finally:
                self.separation = self.masks = None

    @torch.no_grad()
    def bind(self, velocity: VelocityFunction, noise: Tensor, rows: Tensor) -> int:
        """Where the subjects of this rank's starts are; returns how many rows went through the model for that."""
        if not self._binds:
            return 0
        config, scene = self.config.separation, rows[self.starts // self.members]
        assert config is not None
        if config.mode == "masks":
            self.masks = owner_masks(self.scenes.masks[scene]).to(noise.device)
            return 0
        self.masks, found = None, []
        for part in self.parts(torch.arange(len(self.starts))):
            start = self.starts[part].to(noise.device)
            bind_by_draft(
                lambda x, sigma, start=start: velocity(x, sigma, start), noise[start],  # type: ignore[misc]
                lambda steps: self.model.sigmas(steps, noise.shape[1]), config=config, separation=self.separation,
                decode=lambda x: self.model.decode_pictures(x, self.scenes.grid), finder=self.finder,
                references=self.references_of(scene[part].tolist()), grid=self.scenes.grid,
                watch=(self.adapters.transformer, self.model.backbone, self.scenes.reference_grids), counts=self.scenes.counts,
            )  # fmt: skip
            found.append(self.separation.masks)
        self.masks = torch.cat(found)
        return config.draft_steps * len(self.starts)

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of this rank in parts that go through a model at once."""
        parts: tuple[Tensor, ...] = rows.split(self.online.micro_batch_size or len(rows))
        return parts

    @torch.no_grad()
    def score(self, latents: Tensor, members: Sequence[int]) -> Any:
        """Rewards of finished latents, which belong to the scenes ``members``."""
        decoded = [self.model.decode_pictures(part, self.scenes.grid) for part in self.parts(latents)]
        self.last_pictures, self.last_scenes = torch.cat(decoded), list(members)
        captions = [self.scenes.captions[r] for r in members]
        return self.reward(list(self.last_pictures), captions, self.references_of(members))

    def step(self, index: int) -> dict[str, float]:
        """One iteration: rollout, reward, advantages, update."""
        config, failed = self.config, self.reward.num_failed
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.lr, index, config.num_steps)
        self.scenes = self.buckets.draw(self.generator)
        rows = torch.randint(len(self.scenes), (config.prompts,), generator=self.generator)
        starts = len(rows) * self.members
        noise = torch.randn(starts, *self.scenes.tokens.shape[1:], generator=self.generator).to(self.trainee.device)
        velocity = self.velocity(rows)
        with self.separated():
            drafted = self.bind(velocity, noise, rows)
            update = self._ratio_step if config.objective == "ratio" else self._forward_step
            metrics = update(index, rows, velocity, noise)
        self.trainee.samples_seen += self.share.num_samples
        if not metrics.pop("unmoved"):
            self.trainee.update_ema()
        metrics["reward_failures"] = float(all_sum(torch.tensor(float(self.reward.num_failed - failed))))
        metrics["function_evaluations"] += float(all_sum(torch.tensor(float(drafted))))
        if config.watch.action != "none":
            metrics["watched"] = self._watched()
            self.watch.observe(metrics["reward"], metrics["watched"])
        self.routes = {}
        return metrics

    def _ratio_step(self, index: int, rows: Tensor, velocity: VelocityFunction, noise: Tensor) -> dict[str, float]:
        """`gspo.policy_step`."""
        config, replayed = self.config, self.config.routing_replay
        assert isinstance(self.trainer, PolicyTrainer)
        report = policy_step(
            self.trainer, velocity, noise, self.sigmas,
            lambda latents, start: self.score(latents, rows[start.cpu() // self.members].tolist()), self.online,
            iteration=index, generator=self.generator, reference=self.adapters.disable,
            record=self._record if replayed or config.routing_jitter else None, replay=self._replay if replayed else None,
        )  # fmt: skip
        metrics = {**_metrics(report), "unmoved": float(report.update.skipped)}
        if not report.update.skipped and config.execution.parallel != "fsdp":
            metrics |= self._signal(report.update.num_samples, report.update.grad_norm)
        if config.routing_jitter:
            metrics["routing_jitter"] = self._jitter(velocity, report.rollout)
        return metrics

    def _signal(self, num_samples: int, grad_norm: float) -> dict[str, float]:
        """`gspo.SignalLog`, of what is known."""
        limit = self.online.policy.max_grad_norm
        found = self.signal.observe(
            self.trainer.parameters, num_samples=num_samples, grad_norm=grad_norm, max_grad_norm=limit
        )
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _forward_step(self, index: int, rows: Tensor, velocity: VelocityFunction, noise: Tensor) -> dict[str, float]:
        """`gspo.objective_step` on this rank's groups; metrics are means over the ranks, whose shares are equal."""
        online, here = self.online, self.starts.to(noise.device)
        assert isinstance(self.trainer, ObjectiveTrainer)
        report = objective_step(
            self.trainer, lambda x, sigma, local: velocity(x, sigma, here[local]), noise[here], self.sigmas,
            lambda latents, local: self.score(latents, rows[self.starts[local.cpu()] // self.members].tolist()),
            group_size=1, group_ids=here // self.members, micro_batch_size=online.micro_batch_size,
            advantage_scale=online.advantage_scale, reward_weights=online.reward_weights, reference=self.adapters.disable,
            on_nonfinite="skip",
        )  # fmt: skip
        return _forward_metrics(report, unmoved=report.update.skipped)

    @torch.no_grad()
    def _watched(self) -> float:
        """Mean of the watching judge over the pictures drawn last, all ranks."""
        assert self.watcher is not None and self.last_pictures is not None
        count = len(self.last_scenes)
        seen = torch.linspace(0, count - 1, min(self.config.watch.pictures, count)).round().long().tolist()
        scenes = [self.last_scenes[i] for i in seen]
        captions = [self.scenes.captions[r] for r in scenes]
        scores = self.watcher([self.last_pictures[i] for i in seen], captions, self.references_of(scenes))
        known = torch.as_tensor(np.asarray(scores, np.float64))
        known = known[torch.isfinite(known)]
        total, count = all_sum(
            torch.stack([known.sum(), torch.tensor(float(len(known)), dtype=torch.float64)])
        ).tolist()
        return total / count if count else math.nan

    def finished(self) -> str | None:
        """Why the run should end, where the reward is being gamed and the configuration says so."""
        return self.watch.finished()

    @torch.no_grad()
    def finish(self) -> None:
        """Leaves the weights in the adapters that the configuration keeps."""
        if self.config.keep == "average":
            for name, parameter in self.adapters.named_parameters():
                parameter.copy_(self.trainee.ema[name])

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
        """Adapters, optimizer, moving average, generator, clip range, running means of the gradient's signal."""
        trainer = {
            f"trainer.{k}": torch.as_tensor(v) if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
            for k, v in self.trainer.state_dict().items()
        }
        signal = {f"signal.{k}": v for k, v in self.signal.state_dict().items()}
        watch = self.watch.tensors() if self.config.watch.action != "none" else {}
        return {
            **self.trainee.tensors(),
            **trainer,
            **signal,
            **watch,
            "failed_rewards": torch.tensor(self.reward.num_failed),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`."""
        self.trainee.restore(tensors)
        if isinstance(self.trainer, ObjectiveTrainer):
            self.trainer.load_state_dict(dict(Section(tensors, "trainer.").items()))
        else:
            self.trainer.load_state_dict({k: float(v) for k, v in Section(tensors, "trainer.").items()})
        self.signal.load_state_dict(Section(tensors, "signal."))
        self.watch.restore(tensors)
        self.reward.num_failed = int(tensors["failed_rewards"])

    def notes(self) -> dict[str, Any]:
        """What a checkpoint says about it: besides `Trainee.notes` the objective and the window's schedule."""
        clip = {"clip_range": self.trainer.clip_range} if isinstance(self.trainer, PolicyTrainer) else {}
        return {
            "stage": 2,
            "objective": self.config.objective,
            "window": asdict(self.online.window),
            **clip,
            **self.trainee.notes(),
        }

    def check_notes(self, notes: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another stage, objective, window or adapter."""
        if notes.get("stage", 2) != 2:
            raise UserError(f"checkpoint must be of stage 2, got stage {notes['stage']}")
        if (objective := notes.get("objective", "ratio")) != self.config.objective:
            raise UserError(f"checkpoint must have objective {self.config.objective!r}, got {objective!r}")
        own = asdict(self.online.window)
        window = notes.get("window", own)
        if {**asdict(SlidingWindow(own["num_steps"])), **window} != own:  # earlier versions knew fewer names
            raise UserError(f"checkpoint must have the window {own}, got {window}")
        self.trainee.check_notes(notes)


def _single(reward: Reward, by_name: bool) -> Callable[..., Any]:
    """Scores in single precision, as everything that advantages are made of: totals with their parts, or the parts by name."""

    def score(*columns: Sequence[Any]) -> Any:
        found = reward(*columns)
        if by_name:
            return {name: np.asarray(values, np.float32) for name, values in found.parts.items()}
        return Scores(np.asarray(found.totals, np.float32), found.parts)

    return score


def _metrics(report: StepReport) -> dict[str, float]:
    """What `gspo.policy_step` says over all ranks' samples."""
    found, update = report.summary(), report.update
    # without a signal (all rewards of each group equal) nothing is wrong: only what is not finite counts as skipped
    broken = report.broken_velocities > 0 or math.isnan(found["reward"])
    return {
        **found,
        "ratio_spread": found.pop("ratio_std"),
        "window": float(report.window[0]),
        "skipped": float(broken or (update.skipped and update.num_samples > 0)),
    }


def _forward_metrics(report: ObjectiveReport, *, unmoved: bool) -> dict[str, float]:
    """What `gspo.objective_step` says, as means over the ranks; counts are sums."""
    found = {name: value for name, value in report.summary().items() if math.isfinite(value) or name == "reward"}
    counts = ("zero_variance_groups", "invalid_rewards", "function_evaluations")
    shared = [name for name in found if name not in report.update.signal and name != "grad_norm"]
    summed = all_sum(torch.tensor([found[name] for name in shared], dtype=torch.float64)).tolist()
    for name, value in zip(shared, summed, strict=True):
        found[name] = value if name in counts else value / world_size()
    # without a signal nothing is wrong; a velocity or gradient that is not finite is
    broken = unmoved and (report.update.num_samples > 0 or math.isnan(report.update.grad_norm))
    return {**found, "skipped": float(broken or math.isnan(found["reward"])), "unmoved": float(unmoved)}
