"""The same reward called as TRL, Flow-GRPO and verl-omni call theirs: ``python -m id_reward.examples.adapters``.

The pictures are stand-ins (arrays of embeddings), so that this runs in a moment and needs no extra; with `get_face_backend("dlib")` in
the place of `Standin` it takes photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from id_reward import CompositeReward, Faces, IdentityScorer
from id_reward.integrations.rewards import FlowGRPOReward, TRLReward, VerlOmniReward


class Standin:
    """A face backend whose pictures are arrays (f, d) with one embedding per face."""

    def detect_and_embed(self, images: Sequence[Any]) -> list[Faces]:
        """The rows are the faces."""
        return [Faces(np.tile([0.0, 0, 1, 1], (len(i), 1)), np.ones(len(i)), np.asarray(i, np.float64)) for i in images]


def main() -> dict[str, Any]:
    """Scores two pictures of two people: one with both, one with the same person twice."""
    people = np.eye(2, 8)
    references = [people[:1], people[1:]]
    pictures = [people, people[[0, 0]]]
    prompts = ["two people in a park"] * 2
    reward = CompositeReward({"identity": (IdentityScorer(Standin(), missing_penalty=0.2, extra_penalty=0.2), 1.0)})

    # trl.GRPOTrainer(..., reward_funcs=[TRLReward(reward)]): the data set has a column "references"
    trl = TRLReward(reward)(prompts=prompts, completions=pictures, references=[references] * 2)
    # flow_grpo: reward_fn(images, prompts, metadata)
    flow, _ = FlowGRPOReward(reward)(pictures, prompts, [{"references": references}] * 2)
    # verl-omni: custom_reward_function, one sample at a time
    verl = VerlOmniReward(reward)("people", pictures[1], prompts[1], {"references": references})
    return {"trl": trl, "flow_grpo": flow["avg"], "verl_omni": verl}


if __name__ == "__main__":
    for library, rewards in main().items():
        print(library, rewards)
