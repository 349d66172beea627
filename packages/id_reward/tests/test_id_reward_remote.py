"""`RemoteScorer`, the client: a scorer like any other, whatever the servers do."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward import CompositeReward
from id_reward.serving import RemoteScorer, ScorerServer, ScorerUnavailable
from served_scorers import build
from serving_requests import Held, brightness, file, gray, post, queue_up, text


def test_a_dead_server_is_passed_over() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with ScorerServer.of_scorer(brightness) as one, ScorerServer.of_scorer(brightness) as two:
        remote = RemoteScorer((one.url, dead, two.url), backoff=0, batch_size=1)
        np.testing.assert_allclose(remote([gray(51)] * 9, ["x"] * 9, [[]] * 9), 0.2)
        assert one.engine.metrics.get("pictures") + two.engine.metrics.get("pictures") == 9
        assert one.engine.metrics.get("pictures") >= 3 and two.engine.metrics.get("pictures") >= 3
        assert remote.health()[dead]["status"].startswith("ConnectionRefusedError")
    with pytest.raises(ScorerUnavailable, match=r"no score after 2 rounds over 1 servers; .*ConnectionRefused"):
        RemoteScorer(dead, retries=1, backoff=0)([gray(51)], ["x"], [[]])


def test_the_client_is_a_scorer_like_any_other(tmp_path) -> None:
    """All kinds of pictures; references are sent once; parts and missing values come back."""
    gray(51).save(tmp_path / "x.png")
    torch = pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
    pictures = [
        gray(51),
        tmp_path / "x.png",
        file(51),
        np.full((4, 4, 3), 0.2),
        torch.full((3, 4, 4), 0.2),
        {"bytes": file(51)},
    ]
    with ScorerServer.of_scorer(brightness) as server:
        remote = RemoteScorer(server.url, batch_size=4)
        np.testing.assert_allclose(remote(pictures, ["x"] * 6, [[]] * 6), 0.2)
        reward = CompositeReward({"far": (remote, 2.0), "near": (brightness, 1.0)}, batch_size=3)
        np.testing.assert_allclose(reward(pictures, ["x"] * 6, [[]] * 6).totals, 0.6)
        with pytest.raises(ValueError, match=r"nothing\.png must be a picture"):
            remote(["nothing.png"], ["x"], [[]])
        with pytest.raises(ValueError, match="one entry per picture"):
            remote([gray(1)], [], [[]])
        assert remote([], [], []).shape == (0,)


def test_references_and_parts_arrive_and_none_is_nan() -> None:
    with ScorerServer.of_scorer(build()) as server:
        remote = RemoteScorer(server.url)
        score = remote.score([gray(102), gray(51), gray(9)], ["x", "x", "none"], [[gray(51)], [gray(51)], [gray(51)]])
        np.testing.assert_allclose(score.totals, [0.2, 0, np.nan], atol=1e-12)
        np.testing.assert_allclose(score.parts["together"], 3)


def test_a_full_queue_turns_callers_away_and_they_come_again() -> None:
    slow, one = Held(), {"images": [text(file(255))], "prompts": ["x"]}
    with ScorerServer.of_scorer(slow, max_queue=2, max_wait=0) as server:
        threads = [threading.Thread(target=post, args=(server.url, one)) for _ in range(3)]
        queue_up(threads, slow, server.engine)
        status, answer = post(server.url, one)
        assert status == 429 and "2 pictures are waiting already" in answer.decode()
        threading.Timer(0.2, slow.go.set).start()
        assert RemoteScorer(server.url, retries=20, backoff=0.02)([gray(255)], ["x"], [[]]).tolist() == [1]
        for thread in threads:
            thread.join()
        assert server.engine.metrics.get("requests", '{status="429"}') >= 1


@pytest.mark.parametrize(
    "answer", [b"[]", b'{"scores": [1]}', b'{"scores": ["a", "b"]}', b"nothing", b'{"scores": null}']
)
def test_a_server_that_answers_nonsense_is_not_believed(answer) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Nonsense(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Nonsense) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ScorerUnavailable):
            RemoteScorer(f"http://127.0.0.1:{other.server_address[1]}", retries=0)([gray(1)] * 2, ["x"] * 2, [[]] * 2)
        other.shutdown()


def test_urls_and_timeouts_are_checked() -> None:
    for wrong in ("localhost:1", "ftp://x", (), "http://"):
        with pytest.raises(ValueError, match="urls must"):
            RemoteScorer(wrong)
    with pytest.raises(ValueError, match="timeout"):
        RemoteScorer("http://x", timeout=0)
