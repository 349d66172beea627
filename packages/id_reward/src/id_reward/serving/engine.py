"""Requests of many callers, put together into batches for the workers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from id_reward.errors import InputError
from id_reward.floats import finite, whole
from id_reward.serving.messages import Refused, ScoreRequest
from id_reward.serving.workers import Result, Worker, WorkerDied, WorkerSlow

MAX_SECONDS = 86_400.0  # a day: what waits longer waits for ever
COUNTERS = {
    "requests": "requests answered, by status",
    "pictures": "pictures scored",
    "batches": "batches scored",
    "scoring_seconds": "seconds spent in workers",
}


class Metrics:
    """Counters, as Prometheus reads them."""

    def __init__(self) -> None:
        """All zero."""
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], float] = {}

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Adds to a counter."""
        with self._lock:
            self._values[name, label] = self._values.get((name, label), 0) + amount

    def get(self, name: str, label: str = "") -> float:
        """Its value."""
        return self._values.get((name, label), 0)

    def text(self, gauges: dict[str, float]) -> str:
        """Counters and gauges in Prometheus's text format."""
        with self._lock:
            values = dict(self._values)
        lines = []
        for name, about in COUNTERS.items():
            lines += [f"# HELP id_reward_{name}_total {about}", f"# TYPE id_reward_{name}_total counter"]
            mine = {label: value for (other, label), value in values.items() if other == name} or {"": 0}
            lines += [f"id_reward_{name}_total{label} {value:g}" for label, value in sorted(mine.items())]
        for name, value in gauges.items():
            lines += [f"# TYPE id_reward_{name} gauge", f"id_reward_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def check_batching(
    *, max_batch: int = 32, max_wait: float = 0.005, max_queue: int = 256, batch_timeout: float = 300.0
) -> None:
    """Settings of an `Engine`.

    Raises:
        InputError: One does not fit.
    """
    whole("max_batch", max_batch, least=1)
    whole("max_queue", max_queue, least=1)
    finite("max_wait", max_wait, least=0.0, most=MAX_SECONDS)
    finite("batch_timeout", batch_timeout, above=0.0, most=MAX_SECONDS)


class Engine:
    """A queue, and a thread for each worker that takes batches out of it.

    Args:
        workers: Who scores.
        max_batch: Pictures scored together.
        max_wait: Seconds that a request waits for others to join it.
        max_queue: Pictures that may wait; further requests are turned away.
        batch_timeout: Seconds after which a worker that is a process of its own is ended.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_queue: int = 256,
        batch_timeout: float = 300.0,
    ) -> None:
        """Starts the threads."""
        if not workers:
            raise InputError("workers must hold at least one, got none")
        check_batching(max_batch=max_batch, max_wait=max_wait, max_queue=max_queue, batch_timeout=batch_timeout)
        self.workers, self.metrics = list(workers), Metrics()
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.batch_timeout = batch_timeout
        self._waiting: deque[tuple[ScoreRequest, Future[Result]]] = deque()
        self._count, self._closed = 0, False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._loop, args=(worker,), daemon=True) for worker in self.workers]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Pictures that wait."""
        return self._count

    @property
    def alive(self) -> int:
        """Workers that can score."""
        return sum(worker.alive for worker in self.workers)

    def submit(self, request: ScoreRequest) -> Future[Result]:
        """Puts a request into the queue.

        Raises:
            Refused: The queue is full, or the server is being shut down.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise Refused("the server is shutting down", 503)
            if self._count and self._count + len(request.images) > self.max_queue:
                raise Refused(f"{self._count} pictures are waiting already, try again later", 429)
            self._waiting.append((request, future))
            self._count += len(request.images)
            self._changed.notify_all()
        return future

    def _pop(self) -> tuple[ScoreRequest, Future[Result]] | None:
        """The first whose caller still waits; None where it has given up."""
        request, future = self._waiting.popleft()
        self._count -= len(request.images)
        return (request, future) if future.set_running_or_notify_cancel() else None

    def _take(self) -> list[tuple[ScoreRequest, Future[Result]]]:
        """The next batch; empty when the engine is closed."""
        batch: list[tuple[ScoreRequest, Future[Result]]] = []
        with self._changed:
            deadline = float("inf")
            while True:
                size = sum(len(request.images) for request, _ in batch)
                if self._waiting and (not batch or size + len(self._waiting[0][0].images) <= self.max_batch):
                    if (one := self._pop()) is not None:
                        batch.append(one)
                        deadline = min(deadline, time.monotonic() + self.max_wait)
                    continue
                left = deadline - time.monotonic()
                if self._closed or self._waiting or (batch and left <= 0) or size >= self.max_batch:
                    return batch
                self._changed.wait(None if left == float("inf") else left)

    def _loop(self, worker: Worker) -> None:
        while True:
            batch = self._take()
            if not batch:
                return
            start = time.monotonic()
            try:
                results = self._run(worker, [request for request, _ in batch])
            except Exception as error:  # whatever happens, somebody waits for an answer
                results = [{"failed": f"{type(error).__name__}: {error}"}] * len(batch)
            self.metrics.add("scoring_seconds", time.monotonic() - start)
            self.metrics.add("batches")
            self.metrics.add(
                "pictures", sum(len(r.images) for (r, _), found in zip(batch, results) if "scores" in found)
            )
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)

    def _run(self, worker: Worker, requests: list[ScoreRequest]) -> list[Result]:
        """The batch; after a death one by one, so that a request that kills its worker fails alone."""
        try:
            return worker.run(requests, self.batch_timeout)
        except WorkerSlow as error:
            return [{"slow": str(error)}] * len(requests)
        except InputError as error:
            return [{"down": str(error)}] * len(requests)
        except WorkerDied:
            results: list[Result] = []
            for request in requests:
                try:
                    results += worker.run([request], self.batch_timeout)
                except WorkerSlow as error:
                    results.append({"slow": str(error)})
                except InputError as error:
                    results.append({"down": str(error)})
                except WorkerDied as error:
                    results.append({"failed": f"{error}, twice on this request"})
            return results

    def close(self) -> None:
        """Answers what is in the queue with an error, and ends the workers."""
        with self._changed:
            self._closed = True
            for _, future in self._waiting:
                if future.set_running_or_notify_cancel():
                    future.set_result({"down": "the server is shutting down"})
            self._waiting.clear()
            self._changed.notify_all()
        for worker in self.workers:
            worker.close()
        for thread in self._threads:
            thread.join(5)
