"""What the tests of serving share: pictures, a scorer, requests."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
from id_reward.images import as_array
from PIL import Image


def gray(level: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (level,) * 3)


def file(level: int, **options) -> bytes:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    gray(level, **options).save(buffer, "PNG")
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def brightness(images, prompts, references):  # type: ignore[no-untyped-def]
    return np.array([as_array(i).mean() / 255 for i in images])


def post(url: str, content, path: str = "/score", **headers):  # type: ignore[no-untyped-def]
    """Status and decoded answer."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def get(url: str, path: str):  # type: ignore[no-untyped-def]
    try:
        with urllib.request.urlopen(url + path, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Held:
    """A scorer that says when it is asked first, waits until it may go on, and remembers how many pictures came together."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self, images, prompts, references):  # type: ignore[no-untyped-def]
        self.sizes.append(len(images))
        self.asked.set()
        self.go.wait(10)
        return brightness(images, prompts, references)


def queue_up(threads, scorer: Held, engine) -> None:  # type: ignore[no-untyped-def]
    """The first request is being scored, all others wait."""
    threads[0].start()
    scorer.asked.wait(10)
    for thread in threads[1:]:
        thread.start()
    while engine.queued < len(threads) - 1:
        time.sleep(0.01)
