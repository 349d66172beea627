"""Where the scoring happens: in this process, or in one of its own, which may die or hang without taking the server along."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from id_reward.aggregate import CompositeReward
from id_reward.errors import InputError
from id_reward.serving.messages import Limits, ScoreRequest, pixels_of

TOGETHER = Limits.max_total_pixels  # pixels that are decoded at a time
Result = Mapping[str, Any]  # {"scores", "parts"}, {"refused": why} or {"failed": why}


class WorkerDied(RuntimeError):
    """The process that was scoring is gone."""


class WorkerSlow(RuntimeError):
    """It did not answer in time, and was ended."""


class Worker(Protocol):
    """Scores batches, one at a time."""

    restarts: int

    @property
    def alive(self) -> bool:
        """Whether it can score."""
        ...

    def run(self, requests: Sequence[ScoreRequest], timeout: float) -> list[Result]:
        """One result for each request."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


def check_reward(reward: CompositeReward) -> CompositeReward:
    """A reward whose scores do not depend on who else happens to be scored at the time.

    Raises:
        InputError: A part is normalised over the batch.
    """
    for name, how in reward.normalization.items():
        if how == "batch":
            raise InputError(
                f"a server mixes requests of many, so {name} must be normalised by (shift, scale), got 'batch'"
            )
    return reward


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _score(
    reward: CompositeReward, decoded: Sequence[tuple[list[Any], Sequence[str], list[list[Any]]]]
) -> list[Result]:
    """Scores of several requests in one call."""
    images = [image for some, _, _ in decoded for image in some]
    prompts = [prompt for _, some, _ in decoded for prompt in some]
    references = [row for _, _, rows in decoded for row in rows]
    score = reward(images, prompts, references)
    results: list[Result] = []
    start = 0
    for some, _, _ in decoded:
        part = slice(start, start + len(some))
        results.append(
            {"scores": _plain(score.totals[part]), "parts": {name: _plain(v[part]) for name, v in score.parts.items()}}
        )
        start += len(some)
    return results


def score_requests(reward: CompositeReward, requests: Sequence[ScoreRequest], max_pixels: int) -> list[Result]:
    """Decodes and scores; a request that cannot be read, or makes the scorer fail, does not spoil the others.

    Of requests that came together only so many are decoded at a time as `TOGETHER` allows.
    """
    results: list[Result] = []
    group: list[ScoreRequest] = []
    pixels = 0
    for request in requests:
        size = pixels_of(request)
        if group and pixels + size > TOGETHER:
            results += _score_group(reward, group, max_pixels)
            group, pixels = [], 0
        group.append(request)
        pixels += size
    return results + (_score_group(reward, group, max_pixels) if group else [])


def _score_group(reward: CompositeReward, requests: Sequence[ScoreRequest], max_pixels: int) -> list[Result]:
    from id_reward.images import open_image

    known: dict[bytes, Any] = {}

    def decode(data: bytes) -> Any:
        if data not in known:
            known[data] = open_image(data, max_pixels=max_pixels)
        return known[data]

    results: list[Result] = [{}] * len(requests)
    readable = {}
    for number, request in enumerate(requests):
        try:
            rows = [[decode(data) for data in row] for row in request.references]
            readable[number] = ([decode(data) for data in request.images], request.prompts, rows)
        except InputError as error:
            results[number] = {"refused": str(error)}
    try:
        found = _score(reward, list(readable.values())) if readable else []
    except Exception:
        found = []
        for one in readable.values():
            try:
                found += _score(reward, [one])
            except InputError as error:
                found.append({"refused": str(error)})
            except Exception as error:
                found.append({"failed": f"{type(error).__name__}: {error}"[:300]})
    for number, result in zip(readable, found, strict=True):
        results[number] = result
    return results


class ThreadWorker:
    """Scores in this process: no start-up, shared models; a scorer that hangs or crashes takes the server along."""

    alive = True

    def __init__(self, reward: CompositeReward, *, max_pixels: int) -> None:
        """Takes a reward."""
        self.reward, self.max_pixels, self.restarts = check_reward(reward), max_pixels, 0

    def run(self, requests: Sequence[ScoreRequest], timeout: float) -> list[Result]:
        """Scores; the timeout cannot be enforced here."""
        return score_requests(self.reward, requests, self.max_pixels)

    def close(self) -> None:
        """Nothing to end."""


def _send(connection: Connection, requests: Sequence[ScoreRequest]) -> None:
    """A header in JSON, then every file once, as it is."""
    place: dict[bytes, int] = {}

    def at(data: bytes) -> int:
        return place.setdefault(data, len(place))

    header = [
        {
            "images": [at(i) for i in r.images],
            "prompts": list(r.prompts),
            "references": [[at(i) for i in row] for row in r.references],
        }
        for r in requests
    ]
    connection.send_bytes(json.dumps([header, len(place)]).encode())
    for data in place:
        connection.send_bytes(data)


def _receive(connection: Connection) -> list[ScoreRequest]:
    header, count = json.loads(connection.recv_bytes())
    files = [connection.recv_bytes() for _ in range(count)]
    return [
        ScoreRequest(
            [files[i] for i in r["images"]], r["prompts"], [[files[i] for i in row] for row in r["references"]]
        )
        for r in header
    ]


def _work(connection: Connection, options: Mapping[str, Any], max_pixels: int) -> None:
    """What the process does: build the scorer, say so, then answer until nobody asks any more."""
    from id_reward.building import build_scorer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends its workers
    try:
        reward = check_reward(build_scorer(options))
    except (InputError, ImportError, OSError) as error:
        connection.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    connection.send_bytes(b"{}")
    while True:
        try:
            requests = _receive(connection)
        except (EOFError, OSError):
            return
        connection.send_bytes(json.dumps(score_requests(reward, requests, max_pixels)).encode())


class ProcessWorker:
    """Scores in a process of its own, which is started again where it died or had to be ended.

    Args:
        options: See `id_reward.building.build_scorer`.
        max_pixels: Of any picture.
        start_timeout: Seconds for loading the models.
    """

    def __init__(self, options: Mapping[str, Any], *, max_pixels: int, start_timeout: float = 600.0) -> None:
        """Starts it, and waits until it is ready.

        Raises:
            InputError: The scorer cannot be built.
        """
        self.options, self.max_pixels, self.start_timeout = dict(options), max_pixels, start_timeout
        self.restarts, self._ended = 0, False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self.options, self.max_pixels))
        self._process.start()
        theirs.close()
        try:
            if not self._connection.poll(self.start_timeout):
                raise InputError(f"the scorer must be ready after {self.start_timeout:g} s, and is not")
            error = json.loads(self._connection.recv_bytes()).get("error")
        except (EOFError, OSError):
            error = "the process that builds the scorer died"
        except InputError:
            self._stop()
            raise
        if error:
            self._stop()
            raise InputError(error)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.is_alive()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    def run(self, requests: Sequence[ScoreRequest], timeout: float) -> list[Result]:
        """One result for each request.

        Raises:
            WorkerDied: The process is gone; the next call starts another.
            WorkerSlow: No answer in time; it was ended, and the next call starts another.
            InputError: Another one could not be started.
        """
        if self._ended:
            raise InputError("the server is shutting down")
        if not self.alive:
            self._stop()
            self.restarts += 1
            self._start()
        slow = threading.Event()

        def end() -> None:
            slow.set()
            self._process.kill()

        watch = threading.Timer(timeout, end)
        watch.start()
        try:
            _send(self._connection, requests)
            results: list[Result] = json.loads(self._connection.recv_bytes())
            return results
        except (EOFError, OSError):
            self._stop()
            if slow.is_set():
                raise WorkerSlow(f"no answer after {timeout:g} s") from None
            raise WorkerDied(f"the scorer's process ended with code {self._process.exitcode}") from None
        finally:
            watch.cancel()

    def close(self) -> None:
        """Ends the process for good."""
        self._ended = True
        self._stop()

    def _stop(self) -> None:
        self._connection.close()
        self._process.join(0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
