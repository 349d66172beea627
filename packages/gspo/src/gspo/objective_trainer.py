"""Updates a policy by an objective that is a mean over points (`gspo.points`): DiffusionNFT, AWM, the divergence mask, yours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gspo.checks import check_seed, require_bool, require_positive, require_real, require_whole
from gspo.distributed import ProcessGroup, resolve, sum_gradients, total, world_size
from gspo.inputs import Numbers, as_numbers
from gspo.moving_average import MovingAverage
from gspo.points import Objective
from gspo.rollout import Hook, Rollout, VelocityFunction
from gspo.signal_log import SignalLog

Reference = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How an objective becomes an update.

    Attributes:
        num_inner_epochs: Updates per rollout, on the same points.
        kl_coef: Weight of ``mean |v - v_reference|^2``, the KL of two forward processes up to a factor by noise level; 0 computes none.
        max_grad_norm: Gradient clipping.
        micro_batch_size: Rows per forward and backward pass; None takes all.
        drop_silent_rows: Leave rows that have no gradient out of the passes. False keeps the batch's shape, which DDP and FSDP need.
        reduce_gradients: Across ranks, sum the gradients here. False where DDP or FSDP averages them in backward.
        walk_window: See `gspo.SignalLog`; 0 keeps no copies of the weights.
        seed: Of the points' noise.
    """

    num_inner_epochs: int = 1
    kl_coef: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    drop_silent_rows: bool = True
    reduce_gradients: bool = True
    walk_window: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self, 1, "num_inner_epochs", "micro_batch_size")
        require_real(self, "kl_coef")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}")
        require_bool(self, "drop_silent_rows", "reduce_gradients")
        check_seed(self.seed)
        require_whole(self, 0, "walk_window")
        require_positive(self, "max_grad_norm")


class ObjectiveStatistics(NamedTuple):
    """What an update did, as of its last epoch (this rank's samples).

    Attributes:
        loss: Mean over samples and points.
        metrics: The objective's own numbers, and ``kl`` to the reference (0 where kl_coef is).
        grad_norm: Before clipping.
        skipped: No sample had an advantage, or the gradient was not finite: no step was taken.
        num_samples: Samples with an advantage, over all ranks.
        num_function_evaluations: Rows for which the velocity was computed, all epochs, old and reference policy included.
        signal: See `SignalLog.summary`.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    skipped: bool
    num_samples: int
    num_function_evaluations: int
    signal: dict[str, float]


@dataclass
class _Problem:
    """One rollout as an update sees it: its points, the rows to pass, and what has been computed of them."""

    velocity_fn: VelocityFunction
    points: Sequence[Any]
    index: Tensor
    advantages: Tensor
    rows: Tensor
    count: float
    scale: float
    reference: Reference | None
    replay: Hook | None
    size: int
    old: dict[tuple[int, int], Tensor]
    evaluations: int = 0

    def parts(self) -> Iterator[tuple[int, int, Tensor]]:
        """Position of the point, first row, rows: one micro-batch after the other."""
        for position in range(len(self.points)):
            for start in range(0, len(self.rows), self.size):
                yield position, start, self.rows[start : start + self.size]

    def point(self, position: int, rows: Tensor) -> Any:
        return self.points[position].rows(rows, self.index.device)

    def velocity(self, point: Any, position: int, rows: Tensor) -> Tensor:
        with self.replay(position, rows) if self.replay else nullcontext():
            velocity = self.velocity_fn(point.latents, point.levels, self.index[rows])
        self.evaluations += len(rows)
        if velocity.shape != point.latents.shape:
            raise ValueError(
                f"velocity_fn must return the shape of latents {tuple(point.latents.shape)}, got {tuple(velocity.shape)}"
            )
        return velocity


class ObjectiveTrainer:
    """Updates a policy from rollouts with any `Objective`: the ratio trainer's sibling, for losses that need no whole sequence.

    The gradient is accumulated one point (and one micro-batch) at a time, so memory does not grow with their number. The mean is over
    all samples with an advantage, also those whose advantage is 0, and over all points.

    The old policy, the one that should draw the samples, is the policy itself where the objective's decay is 0, and a moving average
    of it else: draw inside `old_policy`.

    Across ranks the update is that of one process with all samples. Every rank draws noise of its own: give each another ``seed``.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        objective: Objective[Any],
        config: ObjectiveConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        process_group: ProcessGroup | Literal["world"] | None = "world",
        backward: Callable[[Tensor], object] | None = None,
        clip_grad_norm: Callable[[Sequence[torch.nn.Parameter], float], Any] | None = None,
    ) -> None:
        """Keeps the trained parameters, their optimizer, the objective and the config.

        Args:
            parameters: Trained ones.
            optimizer: Of these parameters.
            objective: See `gspo.points.Objective`.
            config: See `ObjectiveConfig`.
            device: Where the points' noise is drawn.
            process_group: Ranks that train one policy together; "world" is all ranks of torch.distributed if that is initialised, None
                is this process alone.
            backward: Called with every loss in place of ``loss.backward()``, for example ``accelerator.backward``.
            clip_grad_norm: Called with parameters and the largest norm, returns the norm before; for example
                ``accelerator.clip_grad_norm_``.
        """
        self.parameters, self.optimizer, self.objective = list(parameters), optimizer, objective
        self.config = config or ObjectiveConfig()
        self.process_group = process_group
        self.backward = backward or Tensor.backward
        self.clip_grad_norm = clip_grad_norm or torch.nn.utils.clip_grad_norm_
        self.generator = torch.Generator(device).manual_seed(self.config.seed)
        self.iteration = 0
        self.average: MovingAverage | None = None
        settings = optimizer.defaults
        momentum = float(settings.get("betas", (settings.get("momentum", 0.0),))[0])
        self.signal = SignalLog(walk_window=self.config.walk_window, momentum=momentum)

    @property
    def ranks(self) -> ProcessGroup | None:
        """The group that trains together, None for this process alone."""
        return resolve(self.process_group)

    def old_policy(self) -> AbstractContextManager[None]:
        """Inside, the parameters are the old policy's: draw rollouts there."""
        return nullcontext() if self.average is None else self.average.applied()

    def update(
        self,
        velocity_fn: VelocityFunction,
        rollout: Rollout,
        advantages: Tensor | Numbers,
        *,
        reference: Reference | None = None,
        replay: Hook | None = None,
    ) -> ObjectiveStatistics:
        """``num_inner_epochs`` gradient steps on one rollout; then the old policy follows.

        Args:
            velocity_fn: The policy, with gradients.
            rollout: What the old policy drew, by `rollout`, `draw` or `finished_samples`.
            advantages: (b,), or (b, n) with one per token of latents (b, n, ...); a row with a NaN is left out.
            reference: A context manager inside which ``velocity_fn`` is the reference policy (adapters off); needed if kl_coef > 0.
            replay: Context manager around every velocity, called with the position of the point and the rows (routing replay).

        Raises:
            ValueError: Advantages do not fit the rollout, reference is missing, or the objective needs a trajectory and there is none.
        """
        decay = self.objective.decay(self.iteration)
        problem = self._problem(velocity_fn, rollout, advantages, reference, replay)
        if self.average is None and decay > 0:
            self.average = MovingAverage(self.parameters)  # until now the old policy was the policy
        statistics = ObjectiveStatistics(0.0, {}, 0.0, True, int(problem.count), 0, self.signal.summary())
        if problem.count:
            if self.average is not None and not self.average.is_current:
                with torch.no_grad(), self.average.applied():
                    for position, start, rows in problem.parts():
                        point = problem.point(position, rows)
                        problem.old[position, start] = problem.velocity(point, position, rows).detach()
            for epoch in range(self.config.num_inner_epochs):
                statistics = self._epoch(problem, log=epoch == 0)
        if self.average is not None:
            self.average.follow(decay)
        self.iteration += 1
        return statistics._replace(num_function_evaluations=problem.evaluations)

    def _problem(
        self,
        velocity_fn: VelocityFunction,
        rollout: Rollout,
        advantages: Tensor | Numbers,
        reference: Reference | None,
        replay: Hook | None,
    ) -> _Problem:
        config, objective, data = self.config, self.objective, rollout.latents
        if not isinstance(advantages, Tensor):
            advantages = as_numbers("advantages", advantages)
        if advantages.dim() not in (1, 2) or advantages.shape != data.shape[: advantages.dim()]:
            raise ValueError(
                f"advantages must be (b,) or (b, n) for latents {tuple(data.shape)}, got {tuple(advantages.shape)}"
            )
        if objective.needs_trajectory and not rollout.trajectory:
            raise ValueError(
                f"rollout must hold stochastic steps for {type(objective).__name__}, got one without: draw it with gspo.rollout"
            )
        if config.kl_coef and reference is None:
            raise ValueError(
                f"reference must be given when kl_coef is positive, got None with kl_coef {config.kl_coef}"
            )
        advantages = advantages.detach().to(data.device, torch.float32)
        known = torch.isfinite(advantages).reshape(len(data), -1).all(1)
        count = total(float(known.sum()), self.ranks)
        loud = advantages.reshape(len(data), -1).ne(0).any(1)
        passed = known if config.kl_coef or not objective.silent_without_advantage else known & loud
        if not config.drop_silent_rows or replay is not None:
            passed = torch.ones_like(passed)
        used = torch.where(known.reshape(-1, *[1] * (advantages.dim() - 1)), advantages, torch.nan)
        rows = passed.nonzero()[:, 0]
        # DDP and FSDP average over ranks what is here a sum
        scale = 1.0 if config.reduce_gradients else float(world_size(self.ranks))
        points = objective.points(rollout, self.generator) if count else []
        size = config.micro_batch_size or max(len(rows), 1)
        return _Problem(velocity_fn, points, rollout.index, used, rows, count, scale, reference, replay, size, {})

    def _epoch(self, problem: _Problem, *, log: bool) -> ObjectiveStatistics:
        """One step. Only the first of a rollout is logged: later ones are no independent batches."""
        config = self.config
        self.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        for position, start, rows in problem.parts():
            self._backward_part(problem, position, start, rows, totals)
        if config.reduce_gradients:
            sum_gradients(self.parameters, self.ranks)
        norm = float(self.clip_grad_norm(self.parameters, config.max_grad_norm))
        finite = math.isfinite(norm)
        signal = self.signal.summary()
        if finite and log:
            signal = self.signal.observe(
                self.parameters,
                num_samples=int(problem.count),
                grad_norm=norm,
                max_grad_norm=config.max_grad_norm,
            )
        if finite:
            self.optimizer.step()
        loss = float(totals.pop("loss", 0.0))
        seen = max(len(problem.rows) * len(problem.points), 1)
        metrics = {name: float(value) / seen for name, value in totals.items()}
        return ObjectiveStatistics(loss, metrics, norm, not finite, int(problem.count), 0, signal)

    def _backward_part(
        self, problem: _Problem, position: int, start: int, rows: Tensor, totals: dict[str, Tensor]
    ) -> None:
        """Forward and backward of one point of one micro-batch; nothing of its graph is left when it returns."""
        point, advantages = problem.point(position, rows), problem.advantages[rows]
        velocity = problem.velocity(point, position, rows)
        old = problem.old.setdefault((position, start), velocity.detach())  # the first epoch is the old policy's
        losses, metrics = self.objective.loss(velocity, old, point, advantages)
        share = problem.count * len(problem.points) * (losses.numel() // len(losses))
        loss = losses.sum() / share
        if self.config.kl_coef:
            assert problem.reference is not None
            with torch.no_grad(), problem.reference():
                base = problem.velocity(point, position, rows)
            kl = (velocity.float() - base.float()).square().flatten(1).mean(1)
            kl = torch.where(torch.isfinite(advantages.reshape(len(kl), -1)).all(1), kl, torch.zeros_like(kl))
            metrics = {**metrics, "kl": kl.detach()}
            loss = loss + self.config.kl_coef * kl.sum() / (problem.count * len(problem.points))
        self.backward(loss * problem.scale)
        for name, value in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach().sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Iteration, generator, old policy and signal as tensors (for safetensors); parameters and optimizer are the caller's."""
        average = {} if self.average is None else self.average.state_dict()
        return {
            "iteration": torch.tensor(self.iteration),
            "generator": self.generator.get_state(),
            **{f"old_policy.{k}": v for k, v in average.items()},
            **{f"signal.{k}": v for k, v in self.signal.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self.iteration = int(state["iteration"])
        self.generator.set_state(state["generator"].cpu())
        self.signal.load_state_dict(_under(state, "signal."))
        average = _under(state, "old_policy.")
        self.average = None
        if average:
            self.average = MovingAverage(self.parameters)
            self.average.load_state_dict(average)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
