"""``id-reward serve`` in a process of its own: several trainers, workers that die or hang, and what is said before it listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward.serving import RemoteScorer, ScorerServer
from serving_requests import file, get, gray, post, text

HERE = Path(__file__).parent


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
