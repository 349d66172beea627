"""A scorer that asks others: the client of ``id-reward serve``."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from id_reward.aggregate import CompositeScore
from id_reward.errors import InputError
from id_reward.floats import finite, whole
from id_reward.images import as_image, file_name, require_file
from id_reward.inputs import listed_batch
from id_reward.serving.engine import MAX_SECONDS
from id_reward.shapes import Float

MAX_ANSWER = 16_000_000  # bytes
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
        require_file(picture)
        try:
            return Path(picture).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{file_name(picture)} must be a picture, got: {reason}") from None
    buffer = io.BytesIO()
    as_image(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _check_url(url: Any) -> None:
    """Raises InputError where nobody can be asked at it."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except (TypeError, ValueError, AttributeError):  # no text, or a port that is none
        good = False
    if not good or not isinstance(url, str) or not url.isprintable() or " " in url:
        raise InputError(f"urls must be like http://machine:8765, got {url!r}")


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
    releases_gil: bool = field(default=True, init=False)
    _turn: Any = field(default_factory=itertools.count, repr=False, compare=False)

    def __post_init__(self) -> None:
        urls = (self.urls,) if isinstance(self.urls, str) or not isinstance(self.urls, Iterable) else tuple(self.urls)
        for url in urls:
            _check_url(url)
        if not urls:
            raise InputError("urls must name at least one server, got none")
        found = {
            "urls": urls,
            "timeout": finite("timeout", self.timeout, above=0.0, most=MAX_SECONDS),
            "retries": whole("retries", self.retries, least=0, most=100),
            "backoff": finite("backoff", self.backoff, least=0.0, most=MAX_SECONDS),
            "batch_size": whole("batch_size", self.batch_size, least=1),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def _ask(self, url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One request to one server."""
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER + 1)
            if len(content) > MAX_ANSWER:
                raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER:,} bytes")
            return response.status, content
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
                except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                    reason = f"{url}: {type(error).__name__} {error}".strip()
                    continue
                if status == 200 and isinstance(found, dict) and isinstance(found.get("parts", {}), dict):
                    return found
                if status == 200:
                    reason = f"{url}: an answer without scores"
                    continue
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
            answered = found.get("parts", {})
            if start and answered.keys() != parts.keys():
                raise ScorerUnavailable(
                    f"every server must answer with the parts {sorted(parts)}, got {sorted(answered)}"
                )
            for name, values in answered.items():
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


def _is_score(value: Any) -> bool:
    """A finite number; JSON of others may hold NaN, infinity, and whole numbers without end."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _numbers(values: Any, count: int) -> list[float]:
    """A server's numbers, null as NaN."""
    right = isinstance(values, list) and len(values) == count
    if not right or not all(v is None or _is_score(v) for v in values):
        raise ScorerUnavailable(f"the server must answer with {count} numbers, got {str(values)[:80]}")
    return [math.nan if value is None else float(value) for value in values]
