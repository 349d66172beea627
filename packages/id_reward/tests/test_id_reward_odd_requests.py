"""What strangers sent to a scorer, or a scorer to its clients: each of these was a hang, a memory bomb or a number out of nothing once."""

from __future__ import annotations

import base64
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")

sys.path.insert(0, str(Path(__file__).parent))
from id_reward import CompositeReward
from id_reward.serving import Limits, RemoteScorer, ScorerServer, ScorerUnavailable
from id_reward.serving import client as client_module
from id_reward.serving import server as server_module
from id_reward.serving import workers as workers_module
from id_reward.serving.messages import Refused, ScoreRequest, parse
from odd_pictures import brightness, file, gray

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def server() -> Iterator[ScorerServer]:
    with ScorerServer.of_scorer(brightness, limits=Limits(max_total_pixels=1000)) as found:
        yield found


def raw(server: ScorerServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as connection:
        connection.sendall(data)
        return connection.recv(4096)


HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", b" 413 "),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\n{}", b" 411 "),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}", b" 411 "),
        (b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 404 "),
        (b"POST //[ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", b" 404 "),
        (b"GET /health HTTP/1.1\r\nHost: [\r\n\r\n", b" 403 "),
    ],
)  # fmt: skip
def test_requests_that_are_none_are_answered(server: ScorerServer, data: bytes, status: bytes) -> None:
    assert status in raw(server, data)


def test_many_pictures_of_a_few_bytes_are_refused_together() -> None:
    """Every picture is within its limit and all together would be gigabytes."""
    limits = Limits(max_total_pixels=1000)
    content = {"images": [base64.b64encode(file(1, 16, str(n))).decode() for n in range(4)], "prompts": ["x"] * 4}
    with pytest.raises(Refused, match="at most 1,000 pixels in all, got 1,024") as caught:
        parse(json.dumps(content).encode(), "/score", limits)
    assert caught.value.status == 413
    content["images"] = content["images"][:1] * 4  # the same picture is decoded once
    assert len(parse(json.dumps(content).encode(), "/score", limits)[0].images) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (b'"refrences": []', "must spell 'references' so"), (b'"reference_images": []', "must come with references"),
        (b'"prompts": ["y"]', "a name that is there twice"),
    ],
)  # fmt: skip
def test_a_name_that_is_nearly_one_is_not_passed_over(change: bytes, words: str) -> None:
    body = b'{"images": ["' + base64.b64encode(file(1)) + b'"], "prompts": ["x"], ' + change + b"}"
    with pytest.raises(Refused, match=words):
        parse(body, "/score", Limits())


def test_requests_that_come_together_are_decoded_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "TOGETHER", 40)
    sizes: list[int] = []

    def counting(images: Any, prompts: Any, references: Any) -> np.ndarray:
        sizes.append(len(images))
        return brightness(images, prompts, references)

    requests = [ScoreRequest([file(51 * n)], ["x"], [[]]) for n in range(1, 6)]  # 16 pixels each
    found = workers_module.score_requests(CompositeReward({"a": (counting, 1.0)}), requests, 1000)
    assert [r["scores"] for r in found] == [[pytest.approx(n / 5)] for n in range(1, 6)]
    assert sizes == [2, 2, 1]


def test_a_body_that_trickles_does_not_hold_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module._Handler, "patience", 0.5)
    with ScorerServer.of_scorer(brightness, max_connections=1) as server:
        connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10)
        connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        ended = False
        for _ in range(100):  # a byte every tenth of a second, for ever
            try:
                connection.sendall(b" ")
            except OSError:
                ended = True
                break
            time.sleep(0.1)
        assert ended


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": INF}, {"timeout": "1"}, {"max_connections": 1.5}, {"missing_score": NAN}, {"missing_score": "0"}, {"max_wait": INF},
        {"max_batch": 2.5}, {"max_queue": NAN}, {"batch_timeout": INF}, {"host": ""}, {"host": None}, {"port": "x"}, {"port": 70000},
    ],
)  # fmt: skip
def test_settings_of_a_server(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ScorerServer.of_scorer(brightness, **options).close()


def test_settings_are_looked_at_before_a_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused setting left the processes of the scorer behind, and the command never ended."""
    monkeypatch.setattr(server_module, "ProcessWorker", lambda *a, **k: pytest.fail("a process was started"))
    for options in ({"timeout": INF}, {"port": -1}, {"max_batch": 0}, {"host": " "}):
        with pytest.raises(ValueError, match="must be"):
            ScorerServer.of_options({}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": INF}, {"timeout": "5"}, {"retries": 1.5}, {"backoff": INF}, {"batch_size": 1.5}, {"batch_size": True},
        {"urls": "http://127.0.0.1:99999"}, {"urls": "http://a:x"}, {"urls": [None]}, {"urls": 5}, {"urls": "http://[::1"},
        {"urls": "http://a b"},
    ],
)  # fmt: skip
def test_settings_of_a_client(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        RemoteScorer(**{"urls": "http://127.0.0.1:1", **options})


def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> HTTPServer:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            answer(self)

        def log_message(self, *arguments: object) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    return other


@pytest.mark.parametrize(
    "answer",
    [
        b'{"scores": [NaN]}', b'{"scores": [Infinity]}', b'{"scores": [true]}', b'{"scores": [1], "parts": []}', b"5", b'[["scores", [1]]]',
        b'{"scores": [' + b"9" * 400 + b"]}", b"[" * 100_000,
    ],
)  # fmt: skip
def test_scores_that_are_none_are_not_believed(answer: bytes) -> None:
    with answering(lambda handler: handler.wfile.write(answer)) as other:  # type: ignore[func-returns-value]
        url = f"http://127.0.0.1:{other.server_address[1]}"
        with pytest.raises(ScorerUnavailable):
            RemoteScorer(url, retries=0).score([gray(1)], ["x"], [[]])
        other.shutdown()


def test_an_answer_without_an_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_ANSWER", 10_000)

    def endless(handler: BaseHTTPRequestHandler) -> None:
        try:
            for _ in range(10_000):
                handler.wfile.write(b" " * 10_000)
        except OSError:
            pass

    with answering(endless) as other:
        with pytest.raises(ScorerUnavailable, match="more than 10,000 bytes"):
            RemoteScorer(f"http://127.0.0.1:{other.server_address[1]}", retries=0)([gray(1)], ["x"], [[]])
        other.shutdown()
