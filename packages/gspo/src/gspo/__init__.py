"""Sequence-level policy optimization for diffusion and flow models."""

from gspo.advantage import (
    GroupStatistics,
    MissingRewards,
    group_advantages,
    group_has_signal,
    group_statistics,
    multi_reward_advantages,
)
from gspo.clip import ClipRangeTracker, FixedClipRange, MeasuredClipRange, auto_clip_range
from gspo.finite import FiniteVelocity
from gspo.gradient import surrogate_gradient
from gspo.loop import OnlineTrainer, StepReport, policy_step
from gspo.objective import SurrogateLoss, clipped_surrogate_loss, gaussian_kl, guard_step_weights
from gspo.on_policy import OffPolicy, OnPolicyCheck, check_on_policy
from gspo.online_config import OnlineConfig
from gspo.policy_config import PolicyConfig
from gspo.ratio import (
    gaussian_log_ratio,
    guarded_log_ratio,
    guarded_step_importance_ratio,
    importance_ratio,
    sequence_importance_ratio,
    step_importance_ratio,
)
from gspo.reward import RobustReward, Scores
from gspo.rollout import Rollout, WindowStep, rollout
from gspo.score import Rescored, rescore
from gspo.sde import DanceSDE, FlowCPS, FlowODE, FlowSDE, ODEStep, SDEStep, gaussian_log_prob
from gspo.shares import GroupShare, share_groups, shared_noise
from gspo.step import PolicyTrainer, UpdateStatistics
from gspo.window import SlidingWindow

__version__ = "0.1.0"

__all__ = [
    "ClipRangeTracker",
    "DanceSDE",
    "FiniteVelocity",
    "FixedClipRange",
    "FlowCPS",
    "FlowODE",
    "FlowSDE",
    "GroupShare",
    "GroupStatistics",
    "MeasuredClipRange",
    "MissingRewards",
    "ODEStep",
    "OffPolicy",
    "OnPolicyCheck",
    "OnlineConfig",
    "OnlineTrainer",
    "PolicyConfig",
    "PolicyTrainer",
    "Rescored",
    "RobustReward",
    "Rollout",
    "SDEStep",
    "Scores",
    "SlidingWindow",
    "StepReport",
    "SurrogateLoss",
    "UpdateStatistics",
    "WindowStep",
    "auto_clip_range",
    "check_on_policy",
    "clipped_surrogate_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_log_ratio",
    "group_advantages",
    "group_has_signal",
    "group_statistics",
    "guard_step_weights",
    "guarded_log_ratio",
    "guarded_step_importance_ratio",
    "importance_ratio",
    "multi_reward_advantages",
    "policy_step",
    "rescore",
    "rollout",
    "sequence_importance_ratio",
    "share_groups",
    "shared_noise",
    "step_importance_ratio",
    "surrogate_gradient",
]
