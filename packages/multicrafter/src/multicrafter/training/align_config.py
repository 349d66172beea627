"""The knobs of stage 2: gspo's own configuration, and what a run has besides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

from gspo import KERNELS, AdvantageWeightedMatching, DiffusionNFT, OnlineConfig, SlidingWindow

from multicrafter import UserError
from multicrafter.models.binding import BindingConfig
from multicrafter.models.checks import check_finite
from multicrafter.training.loop import LoopConfig
from multicrafter.training.optimization import AdamWConfig, ScheduleConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.rewarding import ScorersConfig
from multicrafter.training.watching import WatchConfig
from multicrafter.world.rewards import RewardConfig
from multicrafter.world.scenes import check_shapes

Made = TypeVar("Made")

MOVED: Mapping[str, str] = {
    "num_sampling_steps": "online.window.num_steps",
    "window_size": "online.window.size",
    "window_interval": "online.window.interval",
    "kernel": "online.kernel.kind",
    "noise_level": "online.kernel.noise_level",
    "group_size": "online.group_size",
    "tail_steps": "online.tail_steps",
    "policy": "online.policy",
    "seed": "online.seed",
}
"""Until 0.3: where the flat names of earlier configurations are now, by dotted name."""


def online_defaults(*, seed: int = 0) -> OnlineConfig:
    """16 steps, a window of two of them that moves every four iterations, five second-order steps after it."""
    return OnlineConfig(window=SlidingWindow(16, size=2, interval=4), tail_steps=5, seed=seed)


def _placed(online: OnlineConfig, old: Mapping[str, Any]) -> OnlineConfig:
    """``online`` with values that have their old names."""
    window = {MOVED[name].rpartition(".")[2]: v for name, v in old.items() if MOVED[name].startswith("online.window.")}
    own = {name: v for name, v in old.items() if MOVED[name] == f"online.{name}"}
    kernel = online.kernel
    if "kernel" in old:
        if old["kernel"] not in KERNELS:
            raise UserError(f"kernel must be one of {tuple(KERNELS)}, got {old['kernel']!r}")
        level = {"noise_level": kernel.noise_level} if hasattr(kernel, "noise_level") else {}
        kernel = KERNELS[old["kernel"]](**level)
    if "noise_level" in old:
        kernel = replace(kernel, noise_level=old["noise_level"])  # type: ignore[type-var]
    return replace(online, window=replace(online.window, **window), kernel=kernel, **own)


def filled(content: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``content``, and what it leaves out as it is in ``default``; nothing is added to a kernel of another kind."""
    if content.get("kind", default.get("kind")) != default.get("kind"):
        return dict(content)
    inner = {
        k: filled(v, default[k])
        for k, v in content.items()
        if isinstance(v, Mapping) and isinstance(default.get(k), Mapping)
    }
    return {**default, **content, **inner}


def modern(content: Mapping[str, Any]) -> dict[str, Any]:
    """An `AlignConfig` as plain data, whichever version wrote it: old names in their places, ``online`` filled up with its defaults.

    >>> modern({"lr": 1e-4, "group_size": 3, "kernel": "flow_cps"})["online"]["kernel"]
    {'noise_level': 0.7, 'kind': 'flow_cps'}
    """
    made = {name: value for name, value in content.items() if name not in MOVED}
    given = made.get("online", {})
    if not isinstance(given, Mapping):
        return made  # whoever reads it refuses it
    online = made["online"] = filled(given, asdict(online_defaults()))
    for name in MOVED.keys() & content.keys():
        _, *parents, leaf = MOVED[name].split(".")
        node = online
        for parent in parents:
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"online.{parent} must be a mapping, got {node!r}")
        node[leaf] = content[name]
    return made


def _old_names(cls: type[Made]) -> type[Made]:
    """Lets a class be made, copied (`dataclasses.replace`) and read by the names in `MOVED` for one more version."""
    make: Callable[..., None] = cls.__init__

    def warn(name: str) -> None:
        message = f"AlignConfig.{name} is now AlignConfig.{MOVED[name]}; the old name leaves with multicrafter 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=3)

    @wraps(make)
    def init(self: Any, **given: Any) -> None:
        old = {name: given.pop(name) for name in MOVED if name in given}
        for name in old:
            warn(name)
        if old:
            given["online"] = _placed(given.get("online") or online_defaults(), old)
        make(self, **given)

    def read(self: Any, name: str) -> Any:
        if name not in MOVED:
            raise AttributeError(f"{cls.__name__!r} has no attribute {name!r}")
        warn(name)
        value = self
        for part in MOVED[name].split("."):
            value = getattr(value, part)
        return value

    cls.__init__, cls.__getattr__ = init, read  # type: ignore[method-assign,assignment,attr-defined]
    return cls


@_old_names
@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Stage 2.

    Attributes:
        num_steps: Iterations; each draws a rollout and updates on it.
        data: Folder of `multicrafter data build`: prompts and references of its photos instead of drawn scenes'. None draws.
        shapes: Sizes (height, width) of pictures; an iteration draws pictures of one of them. A photo's prompt goes to the one nearest to the
            photo's own aspect; of drawn scenes there are as many of each. None takes squares of the size that the adapter was trained at.
        reference_shapes: As in stage 1.
        prompts: Prompts (with their references) an iteration, on all ranks together.
        online: How groups are drawn, rewarded and learned from. One batch is always split over the ranks, and a velocity that is not finite
            always skips the step. ``micro_batch_size`` None takes ``execution.micro_batch``. The seed is also that of the prompts' order.
        objective: "ratio" (``online.policy`` says which), or without a likelihood "nft" or "awm", whose samples a solver draws in
            ``online.window.num_steps`` steps; these two need ``online.own_noise``, and take all but ratio and clip range from ``online.policy``.
        nft: DiffusionNFT, for objective "nft".
        awm: Advantage-weighted matching, for objective "awm".
        separation: How subjects are kept apart in rollouts and updates: None, "draft" (places are found in a draft from each start, as
            pictures are drawn), "attention", or "masks" (of the scenes).
        guidance: Of a base that takes it as an input: what rollouts are sampled, and the policy is trained, at.
        lr: Peak learning rate.
        schedule: How it rises and falls.
        adamw: The rest of the optimizer; gradients are clipped to ``online.policy.max_grad_norm``.
        reward: Weights.
        scorers: Models that the reward of photos is made of; see ``data``.
        reward_normalization: "sum": the weighted sum of the parts is normalised in its group, so that the part with the largest spread
            decides; "each": every part is normalised by itself and then weighted (GDPO), by ``online.reward_weights`` or those of ``reward``.
        keep: Which weights the adapter has in the end: the "last" ones, or their moving "average" (``execution.ema_decay``).
        watch: A judge that is not trained on, against a reward that is gamed.
        routing_replay: Experts that the rollout chose are chosen again in the update (their weights are still the router's, and learn).
        routing_jitter: Measure after every update, in one more pass, which share of the tokens the policy would route otherwise now.
        reward_retries: More attempts where the reward raises, before the pictures that cause it are left out.
        reward_wait_s: Seconds before the first of them, doubled with each.
        execution: Precision, memory, processes.
        loop: How often checkpoints and pictures are written, and when to give up.
    """

    moved: ClassVar[Mapping[str, str]] = MOVED
    modern: ClassVar[Callable[[Mapping[str, Any]], dict[str, Any]]] = staticmethod(modern)

    num_steps: int = 40
    data: str | None = None
    shapes: tuple[tuple[int, int], ...] | None = None
    reference_shapes: tuple[tuple[int, int], ...] | None = None
    prompts: int = 8
    online: OnlineConfig = field(default_factory=online_defaults)
    objective: Literal["ratio", "nft", "awm"] = "ratio"
    nft: DiffusionNFT = field(default_factory=DiffusionNFT)
    awm: AdvantageWeightedMatching = field(default_factory=AdvantageWeightedMatching)
    separation: BindingConfig | None = None
    guidance: float = 2.5
    lr: float = 3e-4
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_steps=5, decay="constant"))
    adamw: AdamWConfig = field(default_factory=lambda: AdamWConfig(betas=(0.9, 0.99)))
    reward: RewardConfig = field(default_factory=RewardConfig)
    scorers: ScorersConfig = field(default_factory=ScorersConfig)
    reward_normalization: Literal["sum", "each"] = "sum"
    keep: Literal["last", "average"] = "last"
    watch: WatchConfig = field(default_factory=WatchConfig)
    routing_replay: bool = False
    routing_jitter: bool = False
    reward_retries: int = 2
    reward_wait_s: float = 1.0
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(save_every=10, best="reward", best_is="highest", picture_every=10)
    )

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("num_steps", "prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_shapes(self.shapes)
        check_shapes(self.reference_shapes, name="reference_shapes")
        if self.lr <= 0:
            raise UserError(f"lr must be positive, got {self.lr}")
        if self.guidance < 1:
            raise UserError(f"guidance must be at least 1, got {self.guidance}")
        for name in ("reward_retries", "reward_wait_s"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.reward_normalization == "sum" and self.online.reward_weights:
            raise UserError(
                f"online.reward_weights must be empty (weights of the parts are those of reward), got {dict(self.online.reward_weights)}"
            )
        if self.keep == "average" and not self.execution.ema_decay:
            raise UserError("keep 'average' needs execution.ema_decay above 0, got 0")
        if self.separation is not None and self.separation.mode not in ("draft", "attention", "masks"):
            raise UserError(
                f"separation.mode must be 'draft', 'attention' or 'masks' in stage 2, got {self.separation.mode!r}"
            )
        if self.objective != "ratio" and not self.online.own_noise:
            raise UserError(f"objective {self.objective!r} needs online.own_noise (members must differ), got False")
        if self.objective != "ratio" and (self.routing_replay or self.routing_jitter):
            raise UserError(f"routing_replay and routing_jitter need objective 'ratio', got {self.objective!r}")
        if self.routing_replay and self.execution.gradient_checkpointing:
            raise UserError("routing_replay needs execution.gradient_checkpointing to be off, got both")

    @property
    def micro_batch(self) -> int | None:
        """Rows of a rollout that go through the model at once; None takes all."""
        return self.online.micro_batch_size or self.execution.micro_batch
