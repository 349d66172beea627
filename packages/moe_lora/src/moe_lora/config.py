"""Configuration of a mixture of LoRA experts."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Literal, get_args

from moe_lora.inputs import check_one_of

Gating = Literal["softmax_then_topk", "topk_then_softmax"]
Dispatch = Literal["grouped", "loop", "dense"]


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


@dataclass(frozen=True, kw_only=True)
class MoELoRAConfig:
    """A mixture of LoRA experts.

    Attributes:
        rank: Rank r of every expert.
        alpha: Scale of the update, alpha / r.
        num_experts: Number of experts e.
        top_k: Experts a token is sent to.
        gating: "softmax_then_topk" (Switch Transformer: the kept probabilities are the weights, the router learns also with
            top_k 1) or "topk_then_softmax" (as MultiCrafter writes it: with top_k 1 the weight is 1 and the router's gradient zero).
        dispatch: How experts are computed; all give the same values.
        jitter: Half width of the uniform noise that multiplies the router's input in training, in [0, 1).
        balance_coef: Weight of the load-balance loss; 0 turns it off.
        z_coef: Weight of the router z-loss; 0 turns it off.
        check_gate: Whether a NaN in the gate raises. It costs an accelerator one synchronisation per layer; compiled graphs never check.
    """

    rank: int
    alpha: float
    num_experts: int = 4
    top_k: int = 1
    gating: Gating = "softmax_then_topk"
    dispatch: Dispatch = "grouped"
    jitter: float = 0.0
    balance_coef: float = 0.01
    z_coef: float = 0.001
    check_gate: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "num_experts", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))  # NumPy's too: files hold plain numbers
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}")
        for name in ("alpha", "jitter", "balance_coef", "z_coef"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool) or not _is_finite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}"[:300])
            object.__setattr__(self, name, value if isinstance(value, (int, float)) else float(value))
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}")
        for name in ("balance_coef", "z_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name, known in (("gating", get_args(Gating)), ("dispatch", get_args(Dispatch))):
            check_one_of(name, getattr(self, name), known)
        if not isinstance(self.check_gate, bool):
            raise ValueError(f"check_gate must be a bool, got {self.check_gate!r}")

    @property
    def scaling(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank
