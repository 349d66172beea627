"""Where every value of a run comes from: the paper (arXiv 2509.21953, section 4.1), a study in docs/results, or ourselves."""

from __future__ import annotations

from typing import Any

from multicrafter.config import settings
from multicrafter.training.pretrain_config import IDARConfig

PAPER: dict[str, Any] = {
    "model.path": "black-forest-labs/FLUX.1-dev",
    "model.backbone": "flux1_dev",
    **{
        f"{prefix}adapters.{k}": v
        for prefix in ("", "pretrain.")
        for k, v in (("rank", 512), ("num_experts", 4), ("top_k", 1))
    },
    **{f"{prefix}world.{k}": v for prefix in ("", "pretrain.") for k, v in (("size", 512), ("reference_size", 320))},
    "align.online.window.num_steps": 16,
    "align.online.window.size": 2,
    "align.online.window.interval": 50,
}
"""What the paper publishes, by dotted name; a value that differs, and every other value, is ours."""

STUDIED: dict[str, tuple[str, Any]] = {
    **{f"pretrain.idar.{k}": ("regime", v) for k, v in settings.to_dict(IDARConfig()).items()},
    "align.online.policy.ratio": ("ratios", "sequence"),
    "align.routing_replay": ("ratios", False),
    "align.online.window.strategy": ("stage2", "fixed"),
    "align.reward_normalization": ("stage2", "each"),
    "align.online.policy.clip_range": ("gspo", "auto"),
    **{f"align.reward.{k}": ("reward_hacking", v) for k, v in (("convention", "multicrafter"), ("extra_penalty", 0.5))},
}
"""The page of docs/results that a value comes from, and that value, by dotted name."""


def provenance(run: object) -> dict[str, str]:
    """For every value of a run: "paper", "ours", or "ours, see" and the study that it comes from.

    >>> from multicrafter.config.recipes import flux1_dev_stage1
    >>> found = provenance(flux1_dev_stage1())
    >>> found["pretrain.adapters.rank"], found["pretrain.idar.coef"], found["pretrain.lr"]
    ('paper', 'ours, see regime', 'ours')
    """

    def mark(name: str, value: Any) -> str:
        if name in PAPER and PAPER[name] == value:
            return "paper"
        study, chosen = STUDIED.get(name, ("", None))
        return f"ours, see {study}" if study and chosen == value else "ours"

    return {k: mark(k, v) for k, v in settings.leaves(settings.to_dict(run)).items()}
