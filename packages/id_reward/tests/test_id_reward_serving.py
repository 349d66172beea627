"""The scorer behind HTTP, in this process: batches, bounds, refusals, and the languages that trainers speak."""

from __future__ import annotations

import http.client
import json
import pickle
import socket
import threading
import time
import urllib.error
from collections.abc import Iterator

import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
import served_scorers
from id_reward.serving import Limits, RemoteScorer, ScorerServer
from serving_requests import Held, brightness, file, get, gray, post, queue_up, text


@pytest.fixture
def server() -> Iterator[ScorerServer]:
    with ScorerServer.of_scorer(
        brightness, limits=Limits(max_pixels=10_000, max_pictures=4, max_references=2)
    ) as found:
        yield found


def test_requests_that_come_together_are_scored_together() -> None:
    slow = Held()
    with ScorerServer.of_scorer(slow, max_batch=4, max_wait=0) as server:
        threads = [threading.Thread(target=RemoteScorer(server.url), args=([gray(51)], ["x"], [[]])) for _ in range(7)]
        queue_up(threads, slow, server.engine)
        slow.go.set()
        for thread in threads:
            thread.join()
    assert slow.sizes == [1, 4, 2]


def test_one_bad_request_in_a_batch_does_not_spoil_the_others() -> None:
    from id_reward import as_composite
    from id_reward.serving.messages import ScoreRequest
    from id_reward.serving.workers import score_requests

    requests = [
        ScoreRequest([file(51)], ["x"], [[]]), ScoreRequest([b"no picture"], ["x"], [[]]), ScoreRequest([file(51)], ["fail"], [[]]),
        ScoreRequest([file(51, size=200)], ["x"], [[]]), ScoreRequest([file(102), file(51)], ["x", "none"], [[], []]),
    ]  # fmt: skip
    found = score_requests(as_composite(served_scorers.brightness), requests, max_pixels=10_000)
    assert found[0]["scores"] == [0.2] and found[4]["scores"] == [0.4, None]
    assert "readable picture" in found[1]["refused"] and found[2]["failed"] == "RuntimeError: no such luck"
    assert "at most 10,000 pixels" in found[3]["refused"]


@pytest.mark.parametrize(("content", "status", "words"), [
    ({"images": [text(file(1))] * 5, "prompts": ["x"] * 5}, 413, "images must have at most 4 entries, got 5"),
    ({"images": [text(file(1))], "prompts": ["x"], "references": [[text(file(1))] * 3]}, 413, "references[0] must have at most 2"),
    ({"images": [text(file(1, size=101))], "prompts": ["x"]}, 400, "at most 10,000 pixels, got 101 x 101"),
    ({"images": ["!"], "prompts": ["x"]}, 400, "images[0] must be a picture in base64"),
    ({"images": [text(b"nothing")], "prompts": ["x"]}, 400, "readable picture"),
    ({"images": ["/etc/passwd"], "prompts": ["x"]}, 400, "picture"),
    ({"images": [text(file(1))], "prompts": ["x"], "references": [["/etc/passwd"]]}, 400, "picture"),
    ({"images": [text(file(1))], "prompts": []}, 400, "prompts must be 1 strings"),
    ({"images": [text(file(1))], "prompts": [3]}, 400, "prompts must be 1 strings"),
    ({"images": [text(file(1))], "prompts": "x"}, 400, "prompts must be a list, got str"),
    ({"images": [], "prompts": []}, 400, "at least one picture"), ({}, 400, "images must be a list"), ([1], 400, "must be an object"),
    ({"images": [text(file(1))], "prompts": ["x"], "references": [[], []]}, 400, "one list for each picture (1), got 2"),
    ({"images": [text(file(1))], "prompts": ["x"], "references": [[0]]}, 400, "of which there are 0"),
    ({"images": [text(file(1))], "prompts": ["x"], "references": [[-1]], "reference_images": [text(file(1))]}, 400, "got -1"),
    ({"images": [text(file(1))], "prompts": ["x"], "references": [[True]]}, 400, "base64, got bool"),
    (b"{", 400, "the body must be JSON"), (b"[" * 100_000, 400, "the body must be JSON"), (b"\xff\xfe", 400, "the body must be JSON"),
    (b"\x80\x04cos\nsystem\n(S'true'\ntR.", 400, "instruction GLOBAL"), (b"\x80", 400, "pickle must be whole"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(server, content, status, words) -> None:
    got, answer = post(server.url, content)
    message = pickle.loads(answer)["error"] if answer[:1] == b"\x80" else json.loads(answer)["error"]
    assert got == status and words in message and "\n" not in message
    assert post(server.url, {"images": [text(file(51))], "prompts": ["x"]})[0] == 200  # and it goes on


def raw(server: ScorerServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as connection:
        connection.sendall(data)
        return connection.recv(4096)


def test_bodies_of_unknown_or_enormous_length_are_not_read(server) -> None:
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 411 " in raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert b" 413 " in raw(server, head + b"Content-Length: 99999999999\r\n\r\n")
    assert b" 411 " in raw(server, head + b"Content-Length: -1\r\n\r\n")
    assert b" 411 " in raw(server, head + b"\r\n")


def test_pages_of_others_in_a_browser_cannot_use_it(server) -> None:
    body = {"images": [text(file(51))], "prompts": ["x"]}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert post(server.url, body, **{"Content-Type": kind})[0] == 415
    assert post(server.url, body, Host="evil.example:80")[0] == 403
    assert post(server.url, body, Host="localhost:80")[0] == 200
    assert get(server.url, "/nothing")[0] == 404 and post(server.url, body, "/nothing")[0] == 404


def test_connections_are_bounded_and_a_silent_one_blocks_nobody() -> None:
    with ScorerServer.of_scorer(brightness, max_connections=2) as server:
        port = int(server.url.rsplit(":", 1)[1])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        time.sleep(0.2)
        with pytest.raises((ConnectionError, http.client.HTTPException, urllib.error.URLError)):
            get(server.url, "/health")
        silent[0].close()
        for _ in range(50):
            try:
                assert get(server.url, "/health")[0] == 200
                break
            except (ConnectionError, http.client.HTTPException, urllib.error.URLError):
                time.sleep(0.05)
        else:
            raise AssertionError("the place was not given back")
        silent[1].close()


def test_it_speaks_what_flow_factorys_remote_reward_speaks() -> None:
    with ScorerServer.of_scorer(served_scorers.build(), missing_score=-1.0) as server:
        content = {
            "prompt": ["x", "none"], "image": [text(file(102)), text(file(9))], "video": None,
            "condition_images": [[text(file(51))], [text(file(51))]], "condition_videos": None,
        }  # fmt: skip
        status, answer = post(server.url, content, "/compute")
        assert status == 200 and json.loads(answer) == {"rewards": [pytest.approx(0.2), -1.0]}
        content["condition_images"] = None
        assert json.loads(post(server.url, content, "/compute")[1])["rewards"] == [0.4, -1.0]


def test_it_speaks_what_verl_omnis_http_client_speaks() -> None:
    """A pickle of plain data, read without unpickling; the answer is a pickle too."""
    with ScorerServer.of_scorer(served_scorers.build(), references=[file(51)]) as server:
        for protocol in (2, 3, 4, 5):
            body = pickle.dumps({"images": [file(102)], "prompts": ["x"], "metadata": {}}, protocol=protocol)
            if protocol == 2:  # bytes are built by a function there
                assert post(server.url, body, "/")[0] == 400
                continue
            for path in ("/", "/score"):
                status, answer = post(server.url, body, path, **{"Content-Type": "application/octet-stream"})
                assert status == 200 and pickle.loads(answer) == {"scores": [pytest.approx(0.2)]}
        given = pickle.dumps({"images": [file(102)], "prompts": ["x"], "metadata": {"references": [[file(102)]]}})
        assert pickle.loads(post(server.url, given)[1]) == {"scores": [0.0]}


def test_limits_and_addresses_are_checked() -> None:
    with pytest.raises(ValueError, match="max_bytes must be a whole number"):
        Limits(max_bytes=0)
    with pytest.raises(ValueError, match="must be able to listen on"):
        ScorerServer.of_scorer(brightness, host="192.0.2.1")
