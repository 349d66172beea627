"""Everything of an online run but the policy, its optimizer and the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gspo.advantage import Scale
from gspo.checks import check_real, check_seed, one_line, require_bool, require_kind, require_whole
from gspo.policy_config import PolicyConfig
from gspo.sde import FlowSDE, Kernel
from gspo.window import SlidingWindow


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """How groups are drawn, rewarded and learned from.

    Attributes:
        window: Schedule of the stochastic steps; its num_steps is the rollout's.
        kernel: Of the stochastic steps.
        group_size: Members per prompt, >= 2.
        tail_steps: Second-order steps after the window, or None for the remaining Euler steps.
        share_prefix: Take the steps before the window once per group.
        own_noise: Members of a group start from noise of their own: there is one start per member, (p * group_size, ...), those of prompt i
            at rows i * group_size onwards. False: from one start per prompt, so that they differ in what the window draws alone.
        micro_batch_size: Rows of a rollout per call of the policy, None for all; ``policy.micro_batch_size`` is the update's.
        offload: Keep trajectories in CPU memory.
        split_batch: Several ranks are given one batch (the same noise, generators in the same state), and each draws its share
            (`share_groups`): the run does not depend on their number. False: every rank is given prompts of its own.
        advantage_scale: See `group_advantages`.
        advantage_ddof: See `group_advantages`.
        reward_weights: By name, for rewards that come as a dict. Empty: 1 each.
        reward_aggregation: Each of these rewards is normalised in its group and then weighted ("normalize_then_sum", GDPO), or their
            weighted sum is normalised ("sum_then_normalize").
        policy: Ratio, clip range, epochs.
        seed: Of the rollouts' noise.
    """

    window: SlidingWindow
    kernel: Kernel = field(default_factory=FlowSDE)
    group_size: int = 8
    tail_steps: int | None = None
    share_prefix: bool = True
    own_noise: bool = False
    micro_batch_size: int | None = None
    offload: bool = False
    split_batch: bool = False
    advantage_scale: Scale = "group"
    advantage_ddof: int = 0
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    reward_aggregation: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum"
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self, 1, "group_size", "tail_steps", "micro_batch_size")
        require_whole(self, 0, "advantage_ddof")
        check_seed(self.seed)
        if not isinstance(self.reward_weights, Mapping):
            raise ValueError(f"reward_weights must be a dictionary by name, got {one_line(self.reward_weights)}")
        for name, weight in self.reward_weights.items():
            check_real(f"reward_weights[{name!r}]", weight)
        require_bool(self, "share_prefix", "own_noise", "offload", "split_batch")
        require_kind(self, window=SlidingWindow, kernel=Kernel, policy=PolicyConfig)
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 (a group of one has no advantage), got {self.group_size}")
        for name, choices in (
            ("advantage_scale", ("group", "global", "none")),
            ("advantage_ddof", (0, 1)),
            ("reward_aggregation", ("normalize_then_sum", "sum_then_normalize")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {one_line(getattr(self, name))}")
