"""One policy update from a rollout."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gspo.batch import UpdateBatch, make_batch
from gspo.clip import ClipPolicy, ClipRangeTracker, FixedClipRange, MeasuredClipRange
from gspo.distributed import ProcessGroup, gather_rows, largest, resolve, sum_gradients, total
from gspo.gradient import surrogate_gradient
from gspo.inputs import Ids, Numbers
from gspo.objective import ClipRange, SurrogateLoss, clipped_surrogate_loss
from gspo.on_policy import ON_POLICY, OffPolicy, problem, tolerance
from gspo.passes import Reference as Reference
from gspo.policy_config import PolicyConfig as PolicyConfig
from gspo.ratio import importance_ratio
from gspo.rollout import Hook, Rollout, VelocityFunction
from gspo.sde import Kernel


class UpdateStatistics(NamedTuple):
    """What an update did, as of its last epoch, over all ranks.

    Attributes:
        surrogate: Loss, clip fraction, approximate KL, mean and spread of the ratio.
        kl: To the reference policy, nats per element; 0 where kl_coef is.
        grad_norm: Before clipping.
        clip_range: Used, the upper one of two; 0 while none has been needed.
        skipped: There was nothing to learn from, or something was not finite: no step was taken.
        num_samples: Samples the surrogate is a mean of.
        num_function_evaluations: Rows for which this rank computed the velocity, all epochs.
        initial_log_ratio: Largest ``|log-ratio|`` before the first step, nats per element; 0 on policy.
    """

    surrogate: SurrogateLoss
    kl: float
    grad_norm: float
    clip_range: float
    skipped: bool
    num_samples: int = 0
    num_function_evaluations: int = 0
    initial_log_ratio: float = 0.0

    @classmethod
    def none(cls, clip_range: ClipRange | None) -> UpdateStatistics:
        """Of an update that did not take place."""
        nothing = SurrogateLoss(*(torch.zeros(()) for _ in range(5)))
        return cls(nothing, 0.0, 0.0, _upper(clip_range), skipped=True)


class _Gradient(NamedTuple):
    """What an epoch's passes left: log-ratios of this rank's rows, the KL's share, the range used, and how many passes there were."""

    log_ratio: Tensor
    kl: float
    clip_range: ClipRange | None
    passes: int


class PolicyTrainer:
    """Updates a policy from rollouts; thin: the formulas are in `gspo.ratio`, `gspo.objective`, `gspo.gradient` and `gspo.clip`.

    The loss reaches the policy only through ``dL = sum_it (dL/dl_it) dl_it`` (`surrogate_gradient`), l_it the log-ratio of step t. So the
    gradient is accumulated one step (and micro-batch) at a time, and memory does not grow with the window. For step ratios ``dL/dl_it``
    is known at its own step. For the sequence ratio it needs all steps first: on policy they are known to be 0 (checked, and repeated if
    it turns out wrong), afterwards a pass without gradients finds them.

    Across ranks the update equals that of one process with all samples.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: PolicyConfig,
        *,
        process_group: ProcessGroup | Literal["world"] | None = "world",
        backward: Callable[[Tensor], object] | None = None,
        clip_grad_norm: Callable[[Sequence[torch.nn.Parameter], float], Any] | None = None,
    ) -> None:
        """Keeps what an update needs.

        Args:
            parameters: Of the policy: their gradients are summed over ranks and clipped.
            optimizer: Theirs.
            config: See `PolicyConfig`.
            process_group: Ranks that train one policy together; "world" is all ranks of torch.distributed if that is initialised, None
                is this process alone.
            backward: Called with every loss in place of ``loss.backward()``, for example ``accelerator.backward``.
            clip_grad_norm: Called with parameters and the largest norm, returns the norm before; for example
                ``accelerator.clip_grad_norm_``.
        """
        self.parameters, self.optimizer, self.config = list(parameters), optimizer, config
        self.process_group = process_group
        self.backward = backward or Tensor.backward
        self.clip_grad_norm = clip_grad_norm or torch.nn.utils.clip_grad_norm_
        self.tracker = ClipRangeTracker(config.clip_range_rate)
        self.clip_range: ClipRange | None = None if config.clip_range == "auto" else config.clip_range
        self._said = False

    @property
    def ranks(self) -> ProcessGroup | None:
        """The group that trains together, None for this process alone."""
        return resolve(self.process_group)

    def state_dict(self) -> dict[str, float]:
        """The last clip range (0 where there is none yet; the upper one of two), and the measured one of each window start."""
        return {"clip_range": _upper(self.clip_range), **self.tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what "auto" has measured. A clip range that the configuration gives stays the one it gives.

        Raises:
            ValueError: It is no state of a `PolicyTrainer`.
        """
        if "clip_range" not in state:
            raise ValueError(f"state must hold 'clip_range' as state_dict() writes it, got {sorted(state)}")
        if self.config.clip_range == "auto":
            self.tracker.load_state_dict(state)
            self.clip_range = state["clip_range"] or None

    def update(
        self,
        velocity_fn: VelocityFunction,
        rollout: Rollout,
        advantages: Numbers,
        kernel: Kernel | None = None,
        *,
        group_ids: Ids | None = None,
        sample_weights: Numbers | None = None,
        reference: Reference | None = None,
        replay: Hook | None = None,
    ) -> UpdateStatistics:
        """``num_inner_epochs`` gradient steps on one rollout.

        The surrogate is a mean over the samples that have an advantage, without the groups in which all advantages are 0; the KL is one
        over all samples.

        Args:
            velocity_fn: The policy, with gradients.
            rollout: What the old policy drew.
            advantages: (b,); a sample with NaN (it has no reward) is left out.
            kernel: The kernel that drew the rollout; by default the rollout says so.
            group_ids: Group of each row if groups span prompts or ranks, as given to `group_advantages`; by default ``rollout.index``.
            sample_weights: See `clipped_surrogate_loss`.
            reference: A context manager inside which ``velocity_fn`` is the reference policy (adapters off); needed if kl_coef > 0.
            replay: See `rescore`; with it no sample is dropped from the passes, since routing belongs to rows.

        Raises:
            ValueError: Advantages have another length than the rollout, the kernel is not the rollout's, reference is missing, or
                off_policy is "raise" and the ratio is not 1.
        """
        batch = make_batch(
            velocity_fn, rollout, advantages, kernel, self.config, ranks=self.ranks, group_ids=group_ids,
            sample_weights=sample_weights, reference=reference, replay=replay, backward=self.backward,
        )  # fmt: skip
        done = _Gradient(batch.passes.nothing(), 0.0, self.clip_range, 0)
        norm, stepped, evaluations, initial = 0.0, False, 0, 0.0
        something = batch.count > 0 or (self.config.kl_coef > 0 and batch.num_scored > 0)
        clip = self._clip_policy()
        for epoch in range(self.config.num_inner_epochs if something else 0):
            if epoch == 0:
                done, initial = self._first(batch, clip)
            else:
                done = self._later(batch, clip, measure=epoch == 1)
            norm, stepped = self._step(batch)
            self.clip_range = done.clip_range or self.clip_range
            evaluations += len(batch.passes.rows) * batch.passes.num_steps * (done.passes + bool(self.config.kl_coef))
        return UpdateStatistics(
            surrogate=self._surrogate(batch, done),
            kl=total(done.kl, self.ranks),
            grad_norm=norm,
            clip_range=_upper(self.clip_range),
            skipped=not stepped,
            num_samples=batch.count,
            num_function_evaluations=evaluations,
            initial_log_ratio=initial,
        )

    def _clip_policy(self) -> ClipPolicy:
        """Where clip ranges come from."""
        config = self.config
        if config.clip_range != "auto":
            return FixedClipRange(config.clip_range)
        return MeasuredClipRange(config.target_clip_fraction, self.tracker, self.ranks)

    def _first(self, batch: UpdateBatch, clip: ClipPolicy) -> tuple[_Gradient, float]:
        """The first gradient on a rollout: the ratio is 1 and nothing is clipped, unless the policy is not the one that drew it."""
        clip_range = clip.at(batch.start)
        log_ratio, kl = self._accumulate(batch, batch.passes.nothing(), clip_range)
        farthest = float(log_ratio.abs().max()) if log_ratio.numel() else 0.0
        farthest = largest(math.inf if math.isnan(farthest) else farthest, self.ranks)
        if farthest > tolerance(batch.passes.rollout) and not self._broken(batch):
            self._say_off_policy(batch, farthest)
        if farthest <= ON_POLICY or self.config.ratio != "sequence":
            return _Gradient(log_ratio, kl, clip_range, 1), farthest
        if clip_range is None:
            clip.observe(batch.start, importance_ratio(self.config.ratio, log_ratio), batch.advantages)
            clip_range = clip.at(batch.start)
        log_ratio, kl = self._accumulate(batch, log_ratio, clip_range)
        return _Gradient(log_ratio, kl, clip_range, 2), farthest

    def _later(self, batch: UpdateBatch, clip: ClipPolicy, *, measure: bool) -> _Gradient:
        """A gradient after the policy has moved; the clip range learns from the first of these."""
        clip_range, known, passes = clip.at(batch.start), None, 1
        if self.config.ratio == "sequence" or clip_range is None:
            known, passes = batch.passes.log_ratios(), 2
        if clip_range is None and known is not None:
            clip.observe(batch.start, importance_ratio(self.config.ratio, known), batch.advantages)
            clip_range, measure = clip.at(batch.start), False
        log_ratio, kl = self._accumulate(batch, known, clip_range)
        if measure:
            clip.observe(batch.start, importance_ratio(self.config.ratio, log_ratio), batch.advantages)
        return _Gradient(log_ratio, kl, clip_range, passes)

    def _accumulate(
        self, batch: UpdateBatch, known: Tensor | None, clip_range: ClipRange | None
    ) -> tuple[Tensor, float]:
        """One pass with gradients; returns the log-ratios it met and this rank's share of the KL.

        A sequence ratio's slope comes from the log-ratios of all steps, ``known``; a step ratio's from those met on the way. Without a
        range nothing has moved, so any range does: 1 stands for it.
        """
        self.optimizer.zero_grad()
        sequence = self.config.ratio == "sequence"
        entries = max(batch.count, 1) * (1 if sequence else batch.passes.num_steps)

        def slope(log_ratio: Tensor, rows: slice, steps: slice) -> Tensor:
            gradient = surrogate_gradient(
                log_ratio,
                batch.advantages[rows],
                clip_range or 1.0,
                ratio=self.config.ratio,
                step_weights=None if batch.step_weights is None else batch.step_weights[steps],
                sample_weights=None if batch.sample_weights is None else batch.sample_weights[rows],
                max_advantage=self.config.max_advantage,
                reduction="sum",
            )
            return gradient / entries

        if not sequence:
            return batch.passes.accumulate(slope)
        assert known is not None
        everything = slope(known, slice(None), slice(None)) if len(known) else known
        return batch.passes.accumulate(lambda _, rows, steps: everything[rows, steps])

    def _step(self, batch: UpdateBatch) -> tuple[float, bool]:
        """Takes the optimizer's step if all is finite, on all ranks or none; returns the gradient's norm and whether it did."""
        if self._broken(batch):
            self.optimizer.zero_grad()
            return math.nan, False
        if self.config.reduce_gradients:
            sum_gradients(self.parameters, self.ranks)
        norm = self.clip_grad_norm(self.parameters, self.config.max_grad_norm)
        value = math.nan if norm is None else float(norm)
        # an optimizer with a loss scaler skips by itself, and has to be told; a hook may keep the norm to itself
        finite = norm is None or math.isfinite(value)
        if finite or getattr(self.optimizer, "scaler", None) is not None:
            self.optimizer.step()
        return value, finite

    def _broken(self, batch: UpdateBatch) -> bool:
        """Whether a velocity was not finite, on any rank."""
        return batch.broken is not None and total(float(batch.broken.num_broken), self.ranks) > 0

    def _surrogate(self, batch: UpdateBatch, done: _Gradient) -> SurrogateLoss:
        """Loss and ratios over all ranks."""
        nothing = torch.ones_like(batch.advantages) if batch.sample_weights is None else batch.sample_weights
        table = torch.cat([batch.advantages[:, None].double(), nothing[:, None].double(), done.log_ratio], 1)
        everyone = gather_rows(table, self.ranks)[0]
        return clipped_surrogate_loss(
            importance_ratio(self.config.ratio, everyone[:, 2:]), everyone[:, 0], done.clip_range or 1.0,
            step_weights=batch.step_weights, sample_weights=everyone[:, 1], max_advantage=self.config.max_advantage,
        )  # fmt: skip

    def _say_off_policy(self, batch: UpdateBatch, farthest: float) -> None:
        """Warns once, or refuses, as the configuration says."""
        if self.config.off_policy == "allow" or (self._said and self.config.off_policy == "warn"):
            return
        self._said = True
        passes = batch.passes
        words = problem(passes.velocity_fn, passes.rollout, farthest, replay=passes.replay)
        if self.config.off_policy == "raise":
            self.optimizer.zero_grad()
            raise ValueError(words)
        warnings.warn(words, OffPolicy, stacklevel=4)


def _upper(clip_range: ClipRange | None) -> float:
    return float(clip_range[1] if isinstance(clip_range, tuple | list) else clip_range or 0.0)
