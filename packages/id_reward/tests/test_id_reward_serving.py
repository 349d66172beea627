"""The scorer behind HTTP: several trainers, processes that die or hang, bounds, and the languages that trainers speak."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward import CompositeReward
from id_reward.images import as_array
from id_reward.serving import Limits, RemoteScorer, ScorerServer, ScorerUnavailable
from PIL import Image

HERE = Path(__file__).parent


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


@contextmanager
def command(*arguments: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``id-reward serve`` in another process; gives its address."""
    paths = os.pathsep.join([str(HERE), *[p for p in sys.path if p]])
    process = subprocess.Popen(
        [sys.executable, "-m", "id_reward", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths, **(env or {})},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line + (
            process.stderr.read() if process.stderr else ""
        )
        yield line.split()[-1], process
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture
def server() -> Iterator[ScorerServer]:
    with ScorerServer.of_scorer(
        brightness, limits=Limits(max_pixels=10_000, max_pictures=4, max_references=2)
    ) as found:
        yield found


# in other processes


def test_two_trainers_share_one_scorer_and_it_survives_what_kills_it(tmp_path) -> None:
    """Two client processes at once; a crash fails its own request alone, is counted, and the next request finds a new worker."""
    client = (
        "import sys; from id_reward.serving import RemoteScorer; from PIL import Image\n"
        "level = int(sys.argv[2]); pictures = [Image.new('RGB', (4, 4), (level + i,) * 3) for i in range(6)]\n"
        "found = RemoteScorer(sys.argv[1], batch_size=2)(pictures, ['x'] * 6, [[Image.new('RGB', (2, 2))]] * 6)\n"
        "print([round(255 * v) for v in found])"
    )
    with command("--scorer", "served_scorers:build", "--max-wait", "0.05") as (url, process):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", client, url, str(level)], stdout=subprocess.PIPE, text=True, env=env
            )
            for level in (10, 100)
        ]
        answers = [json.loads(c.communicate(timeout=60)[0]) for c in clients]
        assert answers == [list(range(10, 16)), list(range(100, 106))]

        crash = {"images": [text(file(9))], "prompts": ["crash"]}
        fine = {"images": [text(file(51))], "prompts": ["x"]}
        results: dict[str, tuple[int, bytes]] = {}
        threads = [
            threading.Thread(target=lambda n=name, c=content: results.__setitem__(n, post(url, c)))
            for name, content in (("crash", crash), ("fine", fine), ("other", fine))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (
            results["crash"][0] == 500 and "ended with code 13, twice on this request" in results["crash"][1].decode()
        )
        for name in ("fine", "other"):
            assert results[name][0] == 200 and json.loads(results[name][1])["scores"] == [0.2]
        once = {"images": [text(file(51))], "prompts": [f"crash-once {tmp_path / 'crashed'}"]}
        assert post(url, once)[0] == 200  # the second worker does it
        status, health = get(url, "/health")
        assert status == 200 and json.loads(health)["workers_alive"] == 1 and json.loads(health)["worker_restarts"] >= 2
        assert "id_reward_pictures_total 1" in get(url, "/metrics")[1]
        process.terminate()
        assert process.wait(timeout=30) == 0


def test_a_slow_model_does_not_stop_the_server_and_a_hanging_one_is_ended() -> None:
    with command("--scorer", "served_scorers:build", "--timeout", "0.4", "--batch-timeout", "4", "--max-wait", "0") as (
        url,
        _,
    ):
        slow = {"images": [text(file(9))], "prompts": ["sleep 0.8"]}
        start = time.monotonic()
        answer: list[tuple[int, bytes]] = []
        thread = threading.Thread(target=lambda: answer.append(post(url, slow)))
        thread.start()
        time.sleep(0.1)
        assert get(url, "/health")[0] == 200 and time.monotonic() - start < 0.8  # while it works
        thread.join()
        assert answer[0][0] == 504 and "no score after 0.4 s" in answer[0][1].decode()
        found = RemoteScorer(url, retries=10, backoff=0.05)([gray(51)], ["x"], [[]])
        assert found.tolist() == [0.2]
        post(url, {"images": [text(file(9))], "prompts": ["sleep 60"]})
        assert RemoteScorer(url, retries=10, backoff=0.05)([gray(51)], ["x"], [[]]).tolist() == [0.2]
        assert json.loads(get(url, "/health")[1])["worker_restarts"] == 1


def test_what_cannot_be_served_is_said_before_it_listens() -> None:
    from id_reward.building import build_scorer
    from id_reward.serving.workers import check_reward

    done = subprocess.run(
        [sys.executable, "-m", "id_reward", "serve", "--port", "0", "--scorer", "served_scorers:build_nothing"],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *[p for p in sys.path if p]])},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr == "error: the weights are not there\n" and done.stdout == ""
    with pytest.raises(ValueError, match="the process that builds the scorer died"):
        ScorerServer.of_options({"scorer": "served_scorers:die"})
    for scorer, words in (
        ("served_scorers:build_batch", r"x must be normalised by \(shift, scale\), got 'batch'"),
        ("served_scorers:absent", "served_scorers has no absent"),
        ("nowhere.at:all", r"there is no module nowhere\.at"),
        ("nowhere", "scorer must be package.module:name, got 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_reward(build_scorer({"scorer": scorer}))
    assert build_scorer({"scorer": "served_scorers:build", "weight": 3.0}).parts["brightness"][1] == 3


def test_an_option_that_would_be_ignored_is_refused(capsys) -> None:
    from id_reward.cli import main

    assert main(["serve", "--scorer", "served_scorers:build", "--missing-penalty", "0.5"]) == 2
    assert "--missing-penalty is of the identity reward" in capsys.readouterr().err
    for wrong in (
        ["--max-pictures", "0"],
        ["--max-megabytes", "nan"],
        ["--reference", "nothing.png"],
        ["--missing-penalty", "-1"],
    ):
        assert main(["serve", *wrong]) == 2


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


# in this process


def test_the_client_is_a_scorer_like_any_other(server, tmp_path) -> None:
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
    from served_scorers import build

    with ScorerServer.of_scorer(build()) as server:
        remote = RemoteScorer(server.url)
        score = remote.score([gray(102), gray(51), gray(9)], ["x", "x", "none"], [[gray(51)], [gray(51)], [gray(51)]])
        np.testing.assert_allclose(score.totals, [0.2, 0, np.nan], atol=1e-12)
        np.testing.assert_allclose(score.parts["together"], 3)


@pytest.fixture(autouse=True)
def _scorers_can_be_imported(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def test_requests_that_come_together_are_scored_together() -> None:
    sizes: list[int] = []
    first, go = threading.Event(), threading.Event()

    def slow(images, prompts, references):  # type: ignore[no-untyped-def]
        sizes.append(len(images))
        first.set()
        go.wait(10)
        return brightness(images, prompts, references)

    with ScorerServer.of_scorer(slow, max_batch=4, max_wait=0) as server:
        threads = [threading.Thread(target=RemoteScorer(server.url), args=([gray(51)], ["x"], [[]])) for _ in range(7)]
        threads[0].start()
        first.wait(10)
        for thread in threads[1:]:
            thread.start()
        while server.engine.queued < 6:
            time.sleep(0.01)
        go.set()
        for thread in threads:
            thread.join()
    assert sizes == [1, 4, 2]


def test_a_full_queue_turns_callers_away_and_they_come_again() -> None:
    started, go = threading.Event(), threading.Event()

    def slow(images, prompts, references):  # type: ignore[no-untyped-def]
        started.set()
        go.wait(10)
        return np.ones(len(images))

    one = {"images": [text(file(1))], "prompts": ["x"]}
    with ScorerServer.of_scorer(slow, max_queue=2, max_wait=0) as server:
        threads = [threading.Thread(target=post, args=(server.url, one)) for _ in range(3)]
        threads[0].start()
        started.wait(10)
        for thread in threads[1:]:
            thread.start()
        while server.engine.queued < 2:
            time.sleep(0.01)
        status, answer = post(server.url, one)
        assert status == 429 and "2 pictures are waiting already" in answer.decode()
        threading.Timer(0.2, go.set).start()
        assert RemoteScorer(server.url, retries=20, backoff=0.02)([gray(1)], ["x"], [[]]).tolist() == [1]
        for thread in threads:
            thread.join()
        assert server.engine.metrics.get("requests", '{status="429"}') >= 1


def test_one_bad_request_in_a_batch_does_not_spoil_the_others() -> None:
    from id_reward import as_composite
    from id_reward.serving.messages import ScoreRequest
    from id_reward.serving.workers import score_requests
    from served_scorers import brightness as told

    requests = [
        ScoreRequest([file(51)], ["x"], [[]]), ScoreRequest([b"no picture"], ["x"], [[]]), ScoreRequest([file(51)], ["fail"], [[]]),
        ScoreRequest([file(51, size=200)], ["x"], [[]]), ScoreRequest([file(102), file(51)], ["x", "none"], [[], []]),
    ]  # fmt: skip
    found = score_requests(as_composite(told), requests, max_pixels=10_000)
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
    from served_scorers import build

    with ScorerServer.of_scorer(build(), missing_score=-1.0) as server:
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
    from served_scorers import build

    with ScorerServer.of_scorer(build(), references=[file(51)]) as server:
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


def test_urls_and_limits_are_checked() -> None:
    for wrong in ("localhost:1", "ftp://x", (), "http://"):
        with pytest.raises(ValueError, match="urls must"):
            RemoteScorer(wrong)
    with pytest.raises(ValueError, match="max_bytes must be a whole number"):
        Limits(max_bytes=0)
    with pytest.raises(ValueError, match="must be able to listen on"):
        ScorerServer.of_scorer(brightness, host="192.0.2.1")
    with pytest.raises(ValueError, match="timeout"):
        RemoteScorer("http://x", timeout=0)


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
