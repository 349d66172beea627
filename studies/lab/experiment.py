"""What a study is made of: experiments, and how much of everything."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gspo import AdvantageWeightedMatching, DiffusionNFT
from multicrafter.config.recipes import ablation
from multicrafter.config.settings import leaves, to_dict
from multicrafter.scoring.evaluate import EvaluateConfig
from multicrafter.training.align_config import MOVED, AlignConfig, online_defaults
from multicrafter.training.pretrain import PretrainConfig
from multicrafter.training.rewarding import ScorersConfig
from multicrafter.training.runs import with_execution
from multicrafter.training.watching import WatchConfig


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a run starts from.

    Attributes:
        family: "people" or "objects".
        minutes: Of training from scratch; None is the base that ships (people only).
        num_heads: Its width is 32 times this.
        text_only: It never sees a reference, and has no guidance.
    """

    family: str = "people"
    minutes: float | None = None
    num_heads: int = 4
    text_only: bool = False

    def __post_init__(self) -> None:
        if self.minutes is None and (self.family != "people" or self.num_heads != 4 or self.text_only):
            raise ValueError(f"minutes must be given for a base that does not ship, got None for {self}")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One model of the tiny world, and what it is measured on.

    Attributes:
        base: Where it starts.
        pretrain: Stage 1; None measures the base itself.
        align: Stage 2, or None.
        tests: Sets of cases.
    """

    base: Base = field(default_factory=Base)
    pretrain: PretrainConfig | None
    align: AlignConfig | None = None
    tests: tuple[EvaluateConfig, ...]

    def __post_init__(self) -> None:
        if self.align is not None and self.pretrain is None:
            raise ValueError("pretrain must be given where align is, got None")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a study does; every study is written in these terms.

    Attributes:
        seeds: Of training; cases are the same for all.
        steps: Of stage 1.
        scenes: To train on.
        cases: To measure on.
        sampling_steps: Of a picture.
        iterations: Of stage 2.
        prompts, group: Of one iteration.
        base_minutes: Of a base that does not ship.
        compile_blocks: See `ExecutionConfig`.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 320
    scenes: int = 2500
    cases: int = 128
    sampling_steps: int = 16
    iterations: int = 24
    prompts: int = 8
    group: int = 8
    base_minutes: float = 30.0
    compile_blocks: bool = True

    def rows(self, seed: int) -> dict[str, tuple[PretrainConfig, AlignConfig | None]]:
        """The rows of the paper's ablation at this size."""
        return {
            name: (self.pretrain(r.pretrain), self.align(r.align) if r.align else None)
            for name, r in ablation(seed=seed).items()
        }

    def pretrain(self, config: PretrainConfig, **changes: Any) -> PretrainConfig:
        """Stage 1 at this size, its batch no larger than what there is to train on."""
        size = {"num_steps": self.steps, "num_scenes": self.scenes, "batch": min(config.batch, self.scenes)}
        config = replace(config, **{**size, **changes})
        return with_execution(config, compile_blocks=self.compile_blocks)  # type: ignore[no-any-return]

    def align(self, config: AlignConfig, **changes: Any) -> AlignConfig:
        """Stage 2 at this size."""
        size = {
            "num_steps": self.iterations,
            "prompts": self.prompts,
            "online": replace(config.online, group_size=self.group),
        }
        return replace(config, **{**size, **changes})

    def test(self, **changes: Any) -> EvaluateConfig:
        """Cases at this size."""
        return EvaluateConfig(**{"num_cases": self.cases, "num_sampling_steps": self.sampling_steps, **changes})


FULL = Budget()
SMOKE = Budget(
    seeds=(0,), steps=1, scenes=8, cases=4, sampling_steps=2, iterations=1, prompts=2, group=2, base_minutes=0.02, compile_blocks=False
)  # fmt: skip


def key_of(content: Any) -> str:
    """Twelve hexadecimal digits of a hash of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


SPEED = ("execution", "loop")
"""Parts of a configuration that change how fast something is, and what is written on the way, but no result."""
ONCE_CONSTANT: dict[str, dict[str, Any]] = {
    "idar": {
        "schedule": {"warmup_steps": 20, "decay": "linear"},
        "adamw": {"betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.0},
        "max_grad_norm": 1.0,
        "sigma_sampling": {"mean": 0.0, "std": 1.0, "shift": 1.0},
    },
    "reference_size": {"references_per_subject": 1},
    "routing_replay": {
        "schedule": {"warmup_steps": 5, "decay": "constant"},
        "adamw": {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0},
        "objective": "ratio",
        "nft": to_dict(DiffusionNFT()),
        "awm": to_dict(AdvantageWeightedMatching()),
        "reward_normalization": "sum",
        "keep": "last",
        "scorers": to_dict(ScorersConfig()),
        "watch": to_dict(WatchConfig()),
    },
    "num_inner_epochs": {"off_policy": "warn", "on_nonfinite": "raise"},
    "multi_id": {"off_pair_penalty": 0.0, "copy_paste": 0.0},
}
"""Knobs that were constants of the code when the first records were made, by a knob that only stage 1, stage 2 or its reward has: at these values they rename no record."""


def _flattened(online: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of ``online`` by their first names, and all others by their own."""
    left, flat = copy.deepcopy(dict(online)), {}
    for old, now in MOVED.items():
        _, *parents, leaf = now.split(".")
        node = left
        for parent in parents:
            node = node[parent]
        if leaf in node:
            flat[old] = node.pop(leaf)
    return flat, leaves({k: v for k, v in left.items() if k not in ("micro_batch_size", "offload", "split_batch")})


def as_first_written(align: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 2's configuration under the names that the first records have: what is in ``online`` now was flat.

    What could not be said then is left out where it is as it always was.
    """
    flat, own = _flattened(align["online"])
    _, usual = _flattened(to_dict(online_defaults()))
    new = {name: value for name, value in own.items() if value != usual.get(name)}
    return {**{k: v for k, v in align.items() if k != "online"}, **flat, **({"online": new} if new else {})}


def deciding(content: Any) -> Any:
    """A configuration (as `to_dict` has it) without what changes nothing but speed, without what is off (None, False: an option that is new, and off by
    default, renames no record), without what a coefficient of 0 leaves without effect, and without what is as it always was.
    """
    if isinstance(content, Mapping):
        if "routing_replay" in content and "policy" not in content:
            content = as_first_written(content)
        if content.get("coef") == 0:
            return {"coef": 0.0}
        stages = [constants for knob, constants in ONCE_CONSTANT.items() if knob in content]
        before = {k: v for constants in stages for k, v in constants.items()}
        return {
            k: deciding(v)
            for k, v in content.items()
            if k not in SPEED and v is not None and v is not False and (k not in before or v != before[k])
        }
    return [deciding(x) for x in content] if isinstance(content, list) else content
