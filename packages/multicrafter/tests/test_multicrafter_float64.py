"""Apple's MPS has no float64. Where pictures are drawn and where stage 1 trains, it is made on the host alone, in functions named here.

Stage 2 is not among them: gspo keeps its log-ratios in float64 on the device of the rollout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.binding import BindingConfig
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.training.pretrain import Pretrain, PretrainConfig, SeparationConfig
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDE = (torch.float64, torch.complex128)
PACKAGES = ("multicrafter", "idar", "moe_lora", "gspo", "id_reward", "diffusers", "transformers", "peft")
ON_THE_HOST = {
    "multicrafter/models/flux/model.sigma_schedule": "numbers of the schedule, made without a device and given out as float32",
    "diffusers/models/embeddings.get_1d_rotary_pos_embed": "diffusers asks for float32 where the positions are on MPS",
}


class Doubles(TorchDispatchMode):
    """Remembers where a float64 tensor came from: the innermost function of a package."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype in WIDE for t in tree_leaves(out)):
            self.made_by.add(_place())
        return out


def _place() -> str:
    """``package/.../file.function`` of the innermost frame that is in one of the packages."""
    frame = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        at = max((i for i, part in enumerate(parts) if part in PACKAGES and i + 1 < len(parts)), default=None)
        if at is not None and "tests" not in parts:
            return "/".join(parts[at:]).removesuffix(".py") + "." + frame.f_code.co_name
        frame = frame.f_back
    return "elsewhere"


def generate(pipe: Any, scenes: Any, mode: str) -> None:
    adapters = Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2))
    pipeline = MultiCrafterPipeline(pipe, adapters, separation=BindingConfig(mode=mode, draft_steps=1))
    pipeline(
        "two people", [Image.new("RGB", (32, 32), c) for c in ("red", "blue")], num_steps=2, size=64, reference_size=32
    )


STAGE1 = PretrainConfig(num_steps=2, batch=4, num_scenes=12, adapters=AdapterConfig(rank=2, alpha=2.0, num_experts=2))


def stage1(pipe: Any, scenes: Any, mode: str) -> None:
    separation = SeparationConfig() if mode == "separated" else None
    stage = Pretrain(pipe, replace(STAGE1, separation=separation), scenes)
    stage.step(0)


@pytest.mark.parametrize(
    ("run", "mode"),
    [
        (generate, "none"),
        (generate, "draft"),
        (generate, "in-flight"),
        (stage1, "plain"),
        (stage1, "separated"),
    ],
)
def test_float64_is_made_on_the_host_only(pipe, scenes, run: Callable[..., None], mode):
    with Doubles() as seen:
        run(pipe, scenes, mode)
    assert not (new := sorted(seen.made_by - ON_THE_HOST.keys())), "\n".join(new)


def test_it_would_be_seen():
    with Doubles() as seen:
        torch.ones(2).double()
        torch.ones(2).to(torch.complex128)
        torch.ones(2) + 1.0
    assert seen.made_by == {"elsewhere"}
