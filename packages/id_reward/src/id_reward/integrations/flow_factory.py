"""The identity reward as a reward model of Flow-Factory.

In its configuration:

    rewards:
      - name: identity
        reward_model: id_reward.integrations.flow_factory.IdentityRewardModel
        weight: 1.0
        batch_size: 16
        backend: dlib            # and every other option of id_reward.building.build_scorer
        missing_penalty: 0.5
        off_pair_penalty: 0.7

The references of a sample are its ``condition_images``. ``scorer: package.module:function`` builds any other reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from id_reward.building import build_scorer
from id_reward.errors import InputError
from id_reward.floats import finite

try:
    import torch
    from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput  # type: ignore[import-not-found]
except ImportError:
    raise ImportError(
        'this reward model needs Flow-Factory: pip install "git+https://github.com/X-GenGroup/Flow-Factory"'
    ) from None

OWN = ("missing_score",)  # options that are this class's, not the scorer's


class IdentityRewardModel(PointwiseRewardModel):  # type: ignore[misc]
    """Scores pictures against their ``condition_images``; Flow-Factory makes it from the configuration above.

    A picture that cannot be scored gets ``missing_score`` (0). Where that is because of its references it is so for its whole group, whose
    advantages are then 0.
    """

    required_fields = ("prompt", "image", "condition_images")
    use_tensor_inputs = False

    def __init__(self, config: Any, accelerator: Any) -> None:
        """Builds the scorer from what the configuration says beyond Flow-Factory's own fields."""
        super().__init__(config, accelerator)
        extra: Mapping[str, Any] = getattr(config, "extra_kwargs", None) or {}
        self.missing_score = finite("missing_score", extra.get("missing_score", 0.0))
        self.reward = build_scorer({name: value for name, value in extra.items() if name not in OWN})
        if "batch" in self.reward.normalization.values():
            raise InputError(
                "Flow-Factory's batches mix groups, so parts must be normalised by (shift, scale), got 'batch'"
            )
        self.reward.to(self.device)

    def __call__(
        self,
        prompt: Sequence[str],
        image: Sequence[Any] | None = None,
        condition_images: Sequence[Sequence[Any]] | None = None,
    ) -> Any:
        """One reward per picture, with the parts in ``extra_info``.

        Raises:
            InputError: There are no pictures, or no references.
        """
        if image is None or condition_images is None:
            missing = "image" if image is None else "condition_images"
            raise InputError(f"the identity reward needs image and condition_images of every sample, got no {missing}")
        score = self.reward(image, prompt, condition_images)
        totals = torch.as_tensor(score.totals, dtype=torch.float32, device=self.device)
        parts = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in score.parts.items()}
        return RewardModelOutput(rewards=torch.nan_to_num(totals, nan=self.missing_score), extra_info=parts)

    def to(self, device: Any) -> IdentityRewardModel:
        """Moves what can be moved."""
        self.reward.to(device)
        self.device = device
        return self
