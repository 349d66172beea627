"""A scorer that asks others: the client of ``id-reward serve``."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from id_reward.aggregate import CompositeScore
from id_reward.errors import InputError
from id_reward.images import as_image
from id_reward.inputs import listed_batch
from id_reward.shapes import Float

AGAIN = {408, 429, 500, 502, 503, 504}  # of these another try, or another server, may know better


class ScorerUnavailable(RuntimeError):
    """No server gave an answer."""


def encode(picture: Any) -> bytes:
    """A picture as a file in memory: a file as it is, anything else as PNG, so that nothing is lost.

    Raises:
        InputError: It is no picture.
    """
    if isinstance(picture, Mapping):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, (bytes, bytearray)):
        return bytes(picture)
    if isinstance(picture, (str, PathLike)):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise InputError(f"{picture} must be a picture, got: {error.strerror}") from None
    buffer = io.BytesIO()
    as_image(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class RemoteScorer:
    """A scorer that asks ``id-reward serve``; thread-safe, so that `CompositeReward` runs it beside others.

    With several servers the requests go to them in turn, and where one does not answer, to the next.

    Attributes:
        urls: Servers, "http://machine:8765".
        timeout: Seconds for one request.
        retries: How often all servers are asked again, with pauses that double.
        backoff: Seconds of the first pause.
        batch_size: Pictures in one request; the server has a limit, see its /health.
    """

    urls: Sequence[str]
    timeout: float = 120.0
    retries: int = 2
    backoff: float = 0.5
    batch_size: int = 32
    releases_gil: bool = True
    _turn: Any = field(default_factory=itertools.count, repr=False, compare=False)

    def __post_init__(self) -> None:
        urls = (self.urls,) if isinstance(self.urls, str) else tuple(self.urls)
        object.__setattr__(self, "urls", urls)
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InputError(f"urls must be like http://machine:8765, got {url!r}")
        if not urls:
            raise InputError("urls must name at least one server, got none")
        if not (self.timeout > 0 and self.retries >= 0 and self.backoff >= 0 and self.batch_size >= 1):
            raise InputError(
                "timeout must be positive, retries and backoff not negative and batch_size at least 1, "
                f"got {self.timeout}, {self.retries}, {self.backoff} and {self.batch_size}"
            )

    def _ask(self, url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One request to one server."""
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _post(self, body: bytes) -> Mapping[str, Any]:
        """One request to whichever server answers."""
        first, reason = next(self._turn), ""
        for attempt in range(self.retries + 1):
            for place in range(len(self.urls)):
                url = self.urls[(first + place) % len(self.urls)]
                try:
                    status, content = self._ask(url, "POST", "/score", body)
                    found = json.loads(content)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    reason = f"{url}: {type(error).__name__} {error}".strip()
                    continue
                if status == 200:
                    return dict(found)
                text = found.get("error", "") if isinstance(found, dict) else ""
                if status not in AGAIN:
                    raise InputError(f"{url} refuses the request: {text} ({status})")
                reason = f"{url}: {text} ({status})"
            if attempt < self.retries:
                time.sleep(self.backoff * 2**attempt)
        raise ScorerUnavailable(f"no score after {self.retries + 1} rounds over {len(self.urls)} servers; {reason}")

    def health(self) -> dict[str, Any]:
        """What each server says of itself, or what is wrong with it."""
        result: dict[str, Any] = {}
        for url in self.urls:
            try:
                result[url] = json.loads(self._ask(url, "GET", "/health")[1])
            except (OSError, http.client.HTTPException, ValueError) as error:
                result[url] = {"status": f"{type(error).__name__}: {error}"}
        return result

    def score(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> CompositeScore:
        """Totals and parts of a batch; what a server could not score is NaN.

        Raises:
            InputError: A picture cannot be read, or a server refuses the request.
            ScorerUnavailable: No server answers.
        """
        images, prompts, rows = listed_batch(images, prompts, references)
        totals: list[float] = []
        parts: dict[str, list[float]] = {}
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            found = self._post(_body(images[part], prompts[part], rows[part]))
            count = len(images[part])
            totals += _numbers(found.get("scores"), count)
            for name, values in found.get("parts", {}).items():
                parts.setdefault(name, []).extend(_numbers(values, count))
        return CompositeScore(np.array(totals), {name: np.array(values) for name, values in parts.items()})

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture, see `score`."""
        return self.score(images, prompts, references).totals


def _body(images: Sequence[Any], prompts: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """The request; every reference is sent once."""
    place: dict[bytes, int] = {}
    encoded: list[tuple[Any, bytes]] = []  # the objects of a group are often the same

    def at(picture: Any) -> int:
        data = next((known for other, known in encoded if other is picture), None)
        if data is None:
            data = encode(picture)
            encoded.append((picture, data))
        return place.setdefault(data, len(place))

    content = {
        "images": [base64.b64encode(encode(image)).decode() for image in images],
        "prompts": [str(prompt) for prompt in prompts],
        "references": [[at(reference) for reference in row] for row in rows],
    }
    content["reference_images"] = [base64.b64encode(data).decode() for data in place]
    return json.dumps(content).encode()


def _numbers(values: Any, count: int) -> list[float]:
    """A server's numbers, null as NaN."""
    right = isinstance(values, list) and len(values) == count
    if not right or not all(v is None or isinstance(v, (int, float)) for v in values):
        raise ScorerUnavailable(f"the server must answer with {count} numbers, got {str(values)[:80]}")
    return [math.nan if value is None else float(value) for value in values]
