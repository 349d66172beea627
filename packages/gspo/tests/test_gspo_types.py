"""What a user's program may write under strict mypy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
import torch
from gspo import FlowCPS, FlowSDE, PolicyConfig, PolicyTrainer, SlidingWindow, group_advantages, rollout

model = torch.nn.Linear(4, 4)


def policy(latents: torch.Tensor, sigma: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    velocity: torch.Tensor = model(latents)
    return velocity


step = FlowSDE().step(torch.zeros(2, 4), torch.zeros(2, 4), 0.5, 0.4)
column: torch.Tensor = step.log_prob_mean[:, None]
total: torch.Tensor = FlowCPS().step(torch.zeros(2, 4), torch.zeros(2, 4), 0.5, 0.4).log_prob_sum.sum()

window = SlidingWindow(num_steps=8, size=2)
drawn = rollout(policy, torch.randn(2, 4), torch.linspace(1, 0, 9), kernel=FlowSDE(), window=window.at(0), group_size=4)
trainer = PolicyTrainer(list(model.parameters()), torch.optim.Adam(model.parameters()), PolicyConfig(clip_range=(1e-3, 2e-3)))
statistics = trainer.update(policy, drawn, group_advantages(drawn.latents.sum(1), drawn.index))
print(float(statistics.surrogate.loss), column.shape, total)
"""

# an ODE step has no density, by type: a None, which nothing can index
BAD = """
import torch
from gspo import FlowODE, FlowSDE, rollout

column = FlowODE().step(torch.zeros(2, 4), torch.zeros(2, 4), 0.5, 0.4).log_prob_mean[:, None]
rollout(lambda x, s, i: x, torch.randn(2, 4), [1.0, 0.5, 0.0], kernel=FlowODE(), window=(0,))
"""


@pytest.mark.slow
def test_a_users_program_is_checked_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy")
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-pretty",
        "--cache-dir",
        str(tmp_path / "cache"),
        "good.py",
        "bad.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    wrong = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [line.split(":")[:2] for line in wrong] == [["bad.py", "5"], ["bad.py", "6"]], done.stdout + done.stderr
    assert "None" in wrong[0] and "Kernel" in wrong[1]
    subprocess.run([sys.executable, "good.py"], cwd=tmp_path, check=True)
