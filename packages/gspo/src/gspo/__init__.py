"""Sequence-level policy optimization for diffusion and flow models."""

from gspo.advantage import GroupStatistics, group_advantages, group_statistics, multi_reward_advantages
from gspo.clip import ClipRangeTracker, auto_clip_range
from gspo.loop import OnlineConfig, OnlineTrainer, StepReport, policy_step
from gspo.objective import SurrogateLoss, clipped_surrogate_loss, gaussian_kl, guard_step_weights
from gspo.ratio import (
    gaussian_log_ratio,
    guarded_step_importance_ratio,
    sequence_importance_ratio,
    step_importance_ratio,
)
from gspo.rollout import Rollout, WindowStep, rollout
from gspo.score import Rescored, rescore
from gspo.sde import DanceSDE, FlowCPS, FlowODE, FlowSDE, SDEStep, gaussian_log_prob
from gspo.step import PolicyConfig, PolicyTrainer, UpdateStatistics
from gspo.window import SlidingWindow

__version__ = "0.1.0"

__all__ = [
    "ClipRangeTracker",
    "DanceSDE",
    "FlowCPS",
    "FlowODE",
    "FlowSDE",
    "GroupStatistics",
    "OnlineConfig",
    "OnlineTrainer",
    "PolicyConfig",
    "PolicyTrainer",
    "Rescored",
    "Rollout",
    "SDEStep",
    "SlidingWindow",
    "StepReport",
    "SurrogateLoss",
    "UpdateStatistics",
    "WindowStep",
    "auto_clip_range",
    "clipped_surrogate_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_log_ratio",
    "group_advantages",
    "group_statistics",
    "guard_step_weights",
    "guarded_step_importance_ratio",
    "multi_reward_advantages",
    "policy_step",
    "rescore",
    "rollout",
    "sequence_importance_ratio",
    "step_importance_ratio",
]
