"""What a stranger writes with each leaf: one program that works and leaves a file, and one that goes on from it in a fresh process.

Both are typed, so that strict mypy reads them as it reads a user's own code. `test_repo_wheels.py` runs them where only the wheel is installed.
"""

from __future__ import annotations

PROGRAMS = {
    "gspo": (
        """
import torch
from gspo import FlowSDE, OnlineConfig, OnlineTrainer, SlidingWindow


def make() -> tuple[torch.nn.Linear, OnlineTrainer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    config = OnlineConfig(window=SlidingWindow(num_steps=6, size=2), kernel=FlowSDE(), group_size=4)
    return model, OnlineTrainer(list(model.parameters()), torch.optim.Adam(model.parameters(), lr=1e-3), config)


def step(model: torch.nn.Linear, trainer: OnlineTrainer) -> float:
    def policy(latents: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        velocity: torch.Tensor = model(latents)
        return velocity

    def reward(latents: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return -latents.square().mean(1)

    noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    return trainer.step(policy, noise, torch.linspace(1, 0, 7), reward).summary()["reward"]


if __name__ == "__main__":
    model, trainer = make()
    step(model, trainer)
    torch.save({"model": model.state_dict(), "trainer": trainer.state_dict()}, "state.pt")
    print(step(model, trainer))
""",
        """
import torch
from first import make, step

model, trainer = make()
state = torch.load("state.pt", weights_only=True)
model.load_state_dict(state["model"])
trainer.load_state_dict(state["trainer"])
print(step(model, trainer))
""",
    ),
    "idar": (
        """
import torch
from idar import SubjectLayout, attention_profile, idar_loss, leakage, separation_bias, subject_attention


def maps(bias: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(2))
    spans, image = layout.subject_spans, layout.image_span
    return subject_attention(query, key, spans, image, direction="image_to_reference", bias=bias)


layout = SubjectLayout.in_order(num_text=2, num_image=4, num_references=[3, 3])
masks = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 1]]])

if __name__ == "__main__":
    apart = maps(separation_bias(layout, masks))
    assert float(leakage(apart, masks).max()) == 0 < float(leakage(maps(), masks).min())
    print(float(idar_loss(maps(), masks).loss))
    profile = attention_profile(maps()[None, None], masks, blocks=("only",), sigmas=(0.5,))
    assert profile.values["leakage"].shape == (1, 1, 2)
""",
        """
from first import maps, masks
from idar import idar_loss

print(float(idar_loss(maps(), masks).loss))
""",
    ),
    "moe_lora": (
        """
import torch
from moe_lora import MoELoRAConfig, inject


def make() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)).requires_grad_(False)


if __name__ == "__main__":
    model = make()
    handle = inject(model, MoELoRAConfig(rank=2, alpha=2.0, num_experts=3, top_k=1), targets=["0", "2"])
    optimizer = torch.optim.Adam(handle.parameters(), lr=1e-2)
    for _ in range(3):
        loss: torch.Tensor = model(torch.randn(4, 8)).square().mean() + handle.aux_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    handle.save("adapter")
    print(float(model(torch.ones(1, 8)).sum()))
""",
        """
import torch
from first import make
from moe_lora import inject_saved

model = make()
handle = inject_saved(model, "adapter")
print(float(model(torch.ones(1, 8)).sum()))
""",
    ),
    "id_reward": (
        """
from collections.abc import Sequence
from typing import Any

import numpy as np
from id_reward import CompositeReward, IdentityScore, multi_id_alignment_reward


def score() -> IdentityScore:
    rng = np.random.default_rng(0)
    return multi_id_alignment_reward(rng.standard_normal((3, 16)), rng.standard_normal((2, 16)), missing_penalty=0.5)


def brightness(
    images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([float(np.mean(image)) for image in images])


if __name__ == "__main__":
    reward = CompositeReward({"brightness": (brightness, 2.0)})
    totals = reward([np.ones((2, 2, 3))], ["a park"], [[]]).totals
    assert float(totals[0]) == 2.0
    print(float(score().reward))
""",
        """
from first import score

print(float(score().reward))
""",
    ),
}
