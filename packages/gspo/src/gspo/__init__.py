"""Sequence-level policy optimization for diffusion and flow models."""

from gspo.advantage import GroupStatistics, group_advantages, group_statistics, multi_reward_advantages
from gspo.objective import SurrogateLoss, clipped_surrogate_loss, gaussian_kl
from gspo.ratio import guarded_step_importance_ratio, sequence_importance_ratio, step_importance_ratio
from gspo.rollout import Rollout, WindowStep, rollout
from gspo.sde import DanceSDE, FlowCPS, FlowODE, FlowSDE, SDEStep, gaussian_log_prob
from gspo.step import PolicyConfig, PolicyTrainer, UpdateStatistics, auto_clip_range, rescore
from gspo.window import SlidingWindow

__version__ = "0.1.0"

__all__ = [
    "DanceSDE",
    "FlowCPS",
    "FlowODE",
    "FlowSDE",
    "GroupStatistics",
    "PolicyConfig",
    "PolicyTrainer",
    "Rollout",
    "SDEStep",
    "SlidingWindow",
    "SurrogateLoss",
    "UpdateStatistics",
    "WindowStep",
    "auto_clip_range",
    "clipped_surrogate_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "group_advantages",
    "group_statistics",
    "guarded_step_importance_ratio",
    "multi_reward_advantages",
    "rescore",
    "rollout",
    "sequence_importance_ratio",
    "step_importance_ratio",
]
