"""Small pictures, their files, and a scorer of brightness, for tests of odd input."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from id_reward.images import as_array
from PIL import Image, PngImagePlugin


def gray(level: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (level,) * 3)


def file(level: int, size: int = 4, mark: str = "") -> bytes:
    buffer, about = io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_text("mark", mark)
    gray(level, size).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def brightness(images: Any, prompts: Any, references: Any) -> np.ndarray:
    return np.array([as_array(i).mean() / 255 for i in images])
