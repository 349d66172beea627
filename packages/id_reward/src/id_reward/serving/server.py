"""The HTTP side of the scorer: the standard library's server, bounded in every direction."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

import id_reward
from id_reward.aggregate import as_composite
from id_reward.errors import InputError
from id_reward.floats import finite, whole
from id_reward.serving.engine import MAX_SECONDS, Engine, check_batching
from id_reward.serving.messages import Dialect, Limits, Refused, answer, error_answer, parse
from id_reward.serving.workers import ProcessWorker, Result, ThreadWorker, Worker

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
STATUS = {"refused": 400, "failed": 500, "down": 503, "slow": 504}  # what became of a request -> HTTP status


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds between two bytes of a slow or silent client
    patience = 120.0  # seconds until a whole request must be there, however steadily it trickles

    def handle_one_request(self) -> None:
        """One request, of which the server knows since when it is awaited."""
        server = cast("_Server", self.server)
        server.awaited[self.connection] = time.monotonic() + self.patience
        try:
            super().handle_one_request()
        finally:
            server.awaited.pop(self.connection, None)

    @property
    def scorer(self) -> ScorerServer:
        return cast("_Server", self.server).scorer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: counts are at /metrics."""

    def _reply(self, status: int, body: bytes, kind: str, *, close: bool = False) -> None:
        self.scorer.engine.metrics.add("requests", label=f'{{status="{status}"}}')
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        if close:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def _stranger(self) -> bool:
        """A page in a browser that speaks to this server under a name of its own."""
        try:
            name = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname
        except ValueError:  # no name that anybody has
            name = None
        return self.scorer.host in LOOPBACK and name not in LOOPBACK

    @property
    def _where(self) -> str:
        """The path that is asked for."""
        return self.path.partition("?")[0].partition("#")[0]

    def do_GET(self) -> None:
        """Health and metrics."""
        path = self._where
        if self._stranger():
            self._reply(403, *error_answer("score", "this server is for this machine"), close=True)
        elif path == "/health":
            content = self.scorer.health()
            self._reply(200 if content["status"] == "ok" else 503, json.dumps(content).encode(), "application/json")
        elif path == "/metrics":
            text = self.scorer.engine.metrics.text(self.scorer.gauges())
            self._reply(200, text.encode(), "text/plain; version=0.0.4")
        else:
            self._reply(404, *error_answer("score", "there are /health and /metrics to get, and /score to post to"))

    def _body(self) -> bytes:
        """The body, if it is of a known and allowed length."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not lengths[0].isdecimal() or self.headers.get("Transfer-Encoding"):
            raise Refused("the request must say its Content-Length, once", 411)
        length = lengths[0].lstrip("0") or "0"
        if len(length) > 18 or int(length) > self.scorer.limits.max_bytes:
            raise Refused(f"the body must have at most {self.scorer.limits.max_bytes:,} bytes, got {length[:18]}", 413)
        if self.headers.get("Content-Type", "").split(";")[0].strip().lower() in (
            "text/plain", "multipart/form-data", "application/x-www-form-urlencoded",
        ):  # fmt: skip
            raise Refused("the body must be application/json, or application/octet-stream", 415)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused("the body ended too early", 400)
        return body

    def do_POST(self) -> None:
        """Scores."""
        dialect: Dialect = "score"
        try:
            if self._stranger():
                raise Refused("this server is for this machine", 403)
            path = self._where
            if path not in ("/", "/score", "/compute"):
                raise Refused(f"there is no {path} to post to, but /score", 404)
            body = self._body()
        except Refused as error:  # the body was not read, so the connection is of no more use
            return self._reply(error.status, *error_answer(dialect, str(error)), close=True)
        except (TimeoutError, ConnectionError):
            self.close_connection = True
            return None
        cast("_Server", self.server).awaited.pop(self.connection, None)  # it is there
        dialect = "pickle" if body[:1] == b"\x80" else "score"
        try:
            request, dialect = parse(body, path, self.scorer.limits, self.scorer.references)
            result = self.scorer.score(request)
        except Refused as error:
            return self._reply(error.status, *error_answer(dialect, str(error)))
        for kind, status in STATUS.items():
            if kind in result:
                return self._reply(status, *error_answer(dialect, result[kind]))
        return self._reply(200, *answer(dialect, result, self.scorer.missing_score))


class _Server(ThreadingHTTPServer):
    """At most so many connections at a time."""

    daemon_threads = True
    scorer: ScorerServer

    def __init__(self, address: tuple[str, int], max_connections: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(max_connections)
        self.awaited: dict[Any, float] = {}  # connection -> until when its request must be there
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def service_actions(self) -> None:
        """Closes connections whose request takes too long to arrive."""
        now = time.monotonic()
        for connection, until in list(self.awaited.items()):
            if now > until:
                self.awaited.pop(connection, None)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is its own affair."""


def check_settings(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    timeout: float = 60.0,
    max_connections: int = 128,
    missing_score: float = 0.0,
    **batching: Any,
) -> None:
    """Settings of a server, asked before a model is loaded.

    Raises:
        InputError: One does not fit.
    """
    finite("timeout", timeout, above=0.0, most=MAX_SECONDS)
    finite("missing_score", missing_score)
    whole("max_connections", max_connections, least=1)
    whole("port", port, least=0, most=65535)
    if not isinstance(host, str) or not host.strip():
        raise InputError(f"host must be an address, such as 127.0.0.1 (0.0.0.0 is all of them), got {host!r}")
    check_batching(**batching)


class ScorerServer:
    """A scorer behind HTTP, from `start` (in a thread) or `serve_forever` until `close`; also a context manager.

    Args:
        workers: Who scores; see `of_scorer` and `of_options`.
        host: Address to listen on. The default is for this machine alone. The server knows no passwords: open it to a trusted network only.
        port: 0 takes a free one; see `url`.
        limits: What a request may hold.
        timeout: Seconds after which a caller is told that it takes too long.
        max_connections: At a time.
        references: Files in memory, for requests that name no references.
        missing_score: What callers get for a picture without a score that cannot be told "none".
        **batching: See `Engine`.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        timeout: float = 60.0,
        max_connections: int = 128,
        references: Sequence[bytes] = (),
        missing_score: float = 0.0,
        **batching: Any,
    ) -> None:
        """Binds the address and starts the workers' threads.

        Raises:
            InputError: The address is taken, or an option does not fit.
        """
        check_settings(
            host=host,
            port=port,
            timeout=timeout,
            missing_score=missing_score,
            max_connections=max_connections,
            **batching,
        )
        self.host, self.limits, self.timeout = host, limits or Limits(), timeout
        self.references, self.missing_score = list(references), missing_score
        try:
            self._server = _Server((host, port), max_connections)
        except (OSError, OverflowError) as error:
            for worker in workers:
                worker.close()
            raise InputError(f"the server must be able to listen on {host}, port {port}, got: {error}") from None
        self._server.scorer = self
        self.engine = Engine(workers, **batching)
        self._thread: threading.Thread | None = None

    @classmethod
    def of_scorer(cls, scorer: Any, *, limits: Limits | None = None, **options: Any) -> ScorerServer:
        """Of a scorer that exists, in this process."""
        limits = limits or Limits()
        return cls([ThreadWorker(as_composite(scorer), max_pixels=limits.max_pixels)], limits=limits, **options)

    @classmethod
    def of_options(
        cls, scorer: Mapping[str, Any], *, processes: int = 1, limits: Limits | None = None, **options: Any
    ) -> ScorerServer:
        """Of a scorer that each of several processes builds for itself; see `id_reward.building.build_scorer`.

        Raises:
            InputError: It cannot be built.
        """
        processes = whole("processes", processes, least=1)
        check_settings(**{name: value for name, value in options.items() if name != "references"})
        limits, workers = limits or Limits(), []
        try:
            for _ in range(processes):
                workers.append(ProcessWorker(scorer, max_pixels=limits.max_pixels))
        except BaseException:
            for worker in workers:
                worker.close()
            raise
        return cls(workers, limits=limits, **options)

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self._server.server_address[1]}"

    def score(self, request: Any) -> Result:
        """Waits for the result of a request.

        Raises:
            Refused: The queue is full, or it takes too long.
        """
        future = self.engine.submit(request)
        try:
            return future.result(self.timeout)
        except FutureTimeout:
            future.cancel()
            raise Refused(f"no score after {self.timeout:g} s", 504) from None

    def health(self) -> dict[str, Any]:
        """Whether it can score, and what it takes."""
        alive = self.engine.alive
        return {
            "status": "ok" if alive else "no worker is alive",
            "version": id_reward.__version__,
            "limits": vars(self.limits),
            **self.gauges(),
        }

    def gauges(self) -> dict[str, float]:
        """Numbers that go up and down."""
        return {
            "workers": len(self.engine.workers),
            "workers_alive": self.engine.alive,
            "worker_restarts": sum(worker.restarts for worker in self.engine.workers),
            "queued_pictures": self.engine.queued,
        }

    def start(self) -> ScorerServer:
        """Serves in a thread."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Serves until it is interrupted."""
        self._server.serve_forever(0.2)

    def close(self) -> None:
        """Ends server and workers."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self.engine.close()

    def __enter__(self) -> ScorerServer:
        return self.start()

    def __exit__(self, *ignored: object) -> None:
        self.close()
