"""Sequence-level policy optimization for diffusion and flow models."""

from gspo.advantage import GroupStatistics, group_advantages, group_statistics, multi_reward_advantages
from gspo.awm import AdvantageWeightedMatching, awm_loss
from gspo.clip import ClipRangeTracker, auto_clip_range
from gspo.credit import token_advantages, token_log_ratio
from gspo.diagnostics import Diagnosis, diagnose, objective_batches, policy_batches
from gspo.dppo import FlowDPPO, kl_mask, masked_surrogate_loss
from gspo.draw import draw, finished_samples
from gspo.forward import NoiseLevels
from gspo.gdpo import gdpo_advantages, whiten
from gspo.loop import OnlineConfig, OnlineTrainer, StepReport, policy_step
from gspo.moving_average import MovingAverage
from gspo.nft import DecaySchedule, DiffusionNFT, nft_loss, optimality
from gspo.objective import SurrogateLoss, clipped_surrogate_loss, gaussian_kl, guard_step_weights
from gspo.objective_loop import ObjectiveReport, objective_step
from gspo.objective_trainer import ObjectiveConfig, ObjectiveStatistics, ObjectiveTrainer
from gspo.points import Objective, RowLosses
from gspo.ratio import (
    gaussian_log_ratio,
    guarded_step_importance_ratio,
    sequence_importance_ratio,
    step_importance_ratio,
)
from gspo.reward_gradient import RewardGradientConfig, RewardGradientTrainer, draft_samples, refl_samples
from gspo.rollout import Rollout, WindowStep, rollout
from gspo.score import Rescored, rescore
from gspo.sde import DanceSDE, FlowCPS, FlowODE, FlowSDE, SDEStep, gaussian_log_prob
from gspo.signal_estimators import controlled_variance, gradient_signal, walk_ratio
from gspo.signal_log import SignalLog
from gspo.step import PolicyConfig, PolicyTrainer, UpdateStatistics
from gspo.window import SlidingWindow

__version__ = "0.1.0"

__all__ = [
    "AdvantageWeightedMatching",
    "ClipRangeTracker",
    "DanceSDE",
    "DecaySchedule",
    "Diagnosis",
    "DiffusionNFT",
    "FlowCPS",
    "FlowDPPO",
    "FlowODE",
    "FlowSDE",
    "GroupStatistics",
    "MovingAverage",
    "NoiseLevels",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveReport",
    "ObjectiveStatistics",
    "ObjectiveTrainer",
    "OnlineConfig",
    "OnlineTrainer",
    "PolicyConfig",
    "PolicyTrainer",
    "Rescored",
    "RewardGradientConfig",
    "RewardGradientTrainer",
    "Rollout",
    "RowLosses",
    "SDEStep",
    "SignalLog",
    "SlidingWindow",
    "StepReport",
    "SurrogateLoss",
    "UpdateStatistics",
    "WindowStep",
    "auto_clip_range",
    "awm_loss",
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
    "group_statistics",
    "guard_step_weights",
    "guarded_step_importance_ratio",
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
    "step_importance_ratio",
    "token_advantages",
    "token_log_ratio",
    "walk_ratio",
    "whiten",
]
