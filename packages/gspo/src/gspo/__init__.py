"""Sequence-level policy optimization for diffusion and flow models."""

from gspo.advantage import (
    GroupStatistics,
    MissingRewards,
    group_advantages,
    group_has_signal,
    group_statistics,
    multi_reward_advantages,
)
from gspo.awm import AdvantageWeightedMatching, awm_loss
from gspo.clip import ClipRangeTracker, FixedClipRange, MeasuredClipRange, auto_clip_range
from gspo.credit import token_advantages, token_log_ratio
from gspo.diagnostics import Diagnosis, diagnose, objective_batches, policy_batches
from gspo.dppo import FlowDPPO, kl_mask, masked_surrogate_loss
from gspo.draw import draw, finished_samples
from gspo.finite import FiniteVelocity
from gspo.forward import NoiseLevels
from gspo.gdpo import gdpo_advantages, whiten
from gspo.gradient import surrogate_gradient
from gspo.loop import OnlineTrainer, StepReport, policy_step
from gspo.moving_average import MovingAverage
from gspo.nft import DecaySchedule, DiffusionNFT, nft_loss, optimality
from gspo.objective import SurrogateLoss, clipped_surrogate_loss, gaussian_kl, guard_step_weights
from gspo.objective_loop import ObjectiveReport, objective_step
from gspo.objective_trainer import ObjectiveConfig, ObjectiveStatistics, ObjectiveTrainer
from gspo.on_policy import OffPolicy, OnPolicyCheck, check_on_policy
from gspo.online_config import OnlineConfig
from gspo.points import Objective, RowLosses
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
from gspo.reward_gradient import RewardGradientConfig, RewardGradientTrainer, draft_samples, refl_samples
from gspo.rollout import Rollout, WindowStep, rollout
from gspo.score import Rescored, rescore
from gspo.sde import KERNELS, DanceSDE, FlowCPS, FlowODE, FlowSDE, ODEStep, SDEStep, gaussian_log_prob
from gspo.shares import GroupShare, share_groups, shared_noise
from gspo.signal_estimators import controlled_variance, gradient_signal, walk_ratio
from gspo.signal_log import SignalLog
from gspo.step import PolicyTrainer, UpdateStatistics
from gspo.window import SlidingWindow

__version__ = "0.2.0"

__all__ = [
    "KERNELS",
    "AdvantageWeightedMatching",
    "ClipRangeTracker",
    "DanceSDE",
    "DecaySchedule",
    "Diagnosis",
    "DiffusionNFT",
    "FiniteVelocity",
    "FixedClipRange",
    "FlowCPS",
    "FlowDPPO",
    "FlowODE",
    "FlowSDE",
    "GroupShare",
    "GroupStatistics",
    "MeasuredClipRange",
    "MissingRewards",
    "MovingAverage",
    "NoiseLevels",
    "ODEStep",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveReport",
    "ObjectiveStatistics",
    "ObjectiveTrainer",
    "OffPolicy",
    "OnPolicyCheck",
    "OnlineConfig",
    "OnlineTrainer",
    "PolicyConfig",
    "PolicyTrainer",
    "Rescored",
    "RewardGradientConfig",
    "RewardGradientTrainer",
    "RobustReward",
    "Rollout",
    "RowLosses",
    "SDEStep",
    "Scores",
    "SignalLog",
    "SlidingWindow",
    "StepReport",
    "SurrogateLoss",
    "UpdateStatistics",
    "WindowStep",
    "auto_clip_range",
    "awm_loss",
    "check_on_policy",
    "clipped_surrogate_loss",
    "controlled_variance",
    "diagnose",
    "draft_samples",
    "draw",
    "finished_samples",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_log_ratio",
    "gdpo_advantages",
    "gradient_signal",
    "group_advantages",
    "group_has_signal",
    "group_statistics",
    "guard_step_weights",
    "guarded_log_ratio",
    "guarded_step_importance_ratio",
    "importance_ratio",
    "kl_mask",
    "masked_surrogate_loss",
    "multi_reward_advantages",
    "nft_loss",
    "objective_batches",
    "objective_step",
    "optimality",
    "policy_batches",
    "policy_step",
    "refl_samples",
    "rescore",
    "rollout",
    "sequence_importance_ratio",
    "share_groups",
    "shared_noise",
    "step_importance_ratio",
    "surrogate_gradient",
    "token_advantages",
    "token_log_ratio",
    "walk_ratio",
    "whiten",
]
