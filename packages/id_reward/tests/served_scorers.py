"""Scorers that the tests of serving hand to other processes; a prompt can make them wait, fail, crash or hang."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from id_reward import CompositeReward


def brightness(images: Any, prompts: Any, references: Any) -> np.ndarray:
    """Mean level / 255, minus that of the first reference; what the prompts say happens first."""
    for prompt in prompts:
        word, _, number = prompt.partition(" ")
        if word == "crash":
            os._exit(13)
        if word == "crash-once" and not os.path.exists(number):
            open(number, "w").close()
            os._exit(13)
        if word == "sleep":
            time.sleep(float(number))
        if word == "fail":
            raise RuntimeError("no such luck")
    found = [
        np.asarray(i, float).mean() / 255 - (np.asarray(r[0], float).mean() / 255 if r else 0)
        for i, r in zip(images, references)
    ]
    return np.array([np.nan if prompt == "none" else value for value, prompt in zip(found, prompts)])


def build(weight: float = 1.0) -> CompositeReward:
    """Brightness, and how many pictures were scored together."""
    together = lambda images, prompts, references: np.full(len(images), float(len(images)))  # noqa: E731
    return CompositeReward({"brightness": (brightness, weight), "together": (together, 0.0)})


def build_batch() -> CompositeReward:
    """What a server cannot serve."""
    return CompositeReward({"x": (brightness, 1.0)}, normalization={"x": "batch"})


def build_nothing() -> None:
    """What is no scorer."""
    raise OSError("the weights are not there")


def die() -> None:
    """A build that takes its process along."""
    os._exit(7)
