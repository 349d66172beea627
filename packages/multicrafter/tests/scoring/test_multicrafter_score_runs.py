"""Whole runs from the command line: evaluate, compare, leaderboard, and what can be wrong with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from multicrafter.cli import main
from multicrafter.scoring.judges import JudgeConfig, Judges, clip_encoder
from multicrafter.scoring.leaderboard import as_markdown, compare_runs, leaderboard
from multicrafter.scoring.manifest import find_cases, read_prompts
from multicrafter.scoring.score import Scores, score
from PIL import Image

JUDGES = ["--faces", "tiny", "--clip", "tiny"]


@pytest.fixture(scope="module")
def runs(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("right", "wrong"):
        argv = [
            "evaluate",
            "--pictures",
            str(asked / name),
            "--manifest",
            str(asked / "manifest.jsonl"),
            "--out",
            str(folder / name),
            *JUDGES,
        ]
        assert main(argv) == 0
    return folder


def test_json_and_page(runs, scored):
    loaded = Scores.load(runs / "right")
    assert loaded.names == scored["right"].names
    for name in loaded.names:
        np.testing.assert_allclose(loaded.values(name), scored["right"].values(name), equal_nan=True)
    content = json.loads((runs / "right" / "scores.json").read_text())
    assert content["summary"]["face_sim"]["mean"] == pytest.approx(scored["right"].summary()["face_sim"].mean)
    page = (runs / "right" / "report.html").read_text()
    assert all(name in page for name in content["summary"])
    assert "data:image/jpeg;base64" in page and "http" not in page.replace("https://", "http://").split("<style>")[0]


def test_every_case_has_its_own_sentence_and_all_of_its_references(asked, scored):
    """CLIP-T and CLIP-I by hand; a number of people that is not that of the references; faces too few are not too many."""
    clip = clip_encoder("tiny")
    prompts = [json.loads(line) for line in (asked / "manifest.jsonl").read_text().splitlines()]

    def pictures(names):
        return clip.embed_pictures([Image.open(asked / n).convert("RGB") for n in names])

    for case, prompt in zip(scored["right"].cases, prompts, strict=True):
        (picture,), (sentence,) = pictures([f"right/{prompt['key']}.png"]), clip.embed_text([prompt["prompt"]])
        assert case["metrics"]["clip_t"] == pytest.approx(picture @ sentence, abs=1e-5)
        references = pictures([r["image"] for r in prompt["references"]])
        assert case["metrics"]["clip_i"] == pytest.approx((references @ picture).mean(), abs=1e-5)
    found = find_cases(
        [replace(p, count=3) for p in read_prompts(asked / "manifest.jsonl")[1]], asked / "right", format="native"
    )
    three = score(found, Judges(JudgeConfig(faces="tiny")), name="three", progress=False)
    two = [case["faces"] == 2 for case in three.cases]
    assert sum(two) >= 4
    for case, only_two in zip(three.cases, two, strict=True):
        assert not only_two or (case["metrics"]["count"], case["metrics"]["extra"]) == (0.0, 0.0)


def test_compare_finds_the_difference_case_by_case(runs, tmp_path, capsys):
    argv = ["compare", str(runs / "wrong"), str(runs / "right" / "scores.json"), "--out", str(tmp_path / "c.json")]
    assert main(argv) == 0
    result = json.loads((tmp_path / "c.json").read_text())["metrics"]["face_sim"]
    assert result["difference"] > 0.2 and result["low"] > 0
    assert result["p"] == pytest.approx(2 / 2**6)  # six prompts, all in one direction: the least p there is
    assert main([*argv[:-1], str(tmp_path / "c.html")]) == 0
    assert "right - wrong" in (tmp_path / "c.html").read_text()
    same, _ = compare_runs(Scores.load(runs / "right"), Scores.load(runs / "right"))
    assert all(c.p == 1.0 and c.difference == 0.0 for c in same.values() if c.cases)


def test_leaderboard(runs, tmp_path, capsys):
    assert (
        main(
            [
                "leaderboard",
                str(runs / "wrong"),
                str(runs / "right"),
                "--out",
                str(tmp_path / "l.html"),
                "--title",
                "A & B",
            ]
        )
        == 0
    )
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[1].startswith("| wrong") or table[1].startswith("| right")
    assert "A &amp; B" in (tmp_path / "l.html").read_text()
    board = leaderboard(
        [Scores.load(runs / n) for n in ("wrong", "right")], sort_by="face_sim", metrics=["face_sim", "extra"]
    )
    assert [r["name"] for r in board.rows] == ["right", "wrong"]
    assert "face_sim" in board.rows[0]["best"] and "face_sim" not in board.rows[1]["best"]
    assert "**" in as_markdown(board)


def test_less_is_better_where_it_is(runs):
    a, b = Scores.load(runs / "right"), Scores.load(runs / "right")
    b.name = "crowd"
    for case in b.cases:
        case["metrics"]["extra"] = 3.0
    board = leaderboard([a, b], sort_by="extra")
    assert board.rows[0]["name"] == "right" and "extra" in board.rows[0]["best"]


def test_runs_that_do_not_compare(runs, tmp_path):
    a, b = Scores.load(runs / "right"), Scores.load(runs / "wrong")
    b.about = {**b.about, "judges": {**b.about["judges"], "clip": "another"}}
    with pytest.raises(ValueError, match="different models"):
        compare_runs(a, b)
    assert compare_runs(a, b, strict=False)[1]
    with pytest.raises(ValueError, match="same judges"):
        leaderboard([a, b])
    with pytest.raises(ValueError, match="different names"):
        leaderboard([a, a])
    b.cases = []
    with pytest.raises(ValueError, match="share cases"):
        compare_runs(a, b, strict=False)


def test_missing_and_broken_pictures_are_never_dropped_silently(asked, tmp_path, capsys):
    shutil.copytree(asked / "right", tmp_path / "p")
    (tmp_path / "p" / "01.png").unlink()
    (tmp_path / "p" / "02.png").write_text("no picture")
    argv = [
        "evaluate",
        "--pictures",
        str(tmp_path / "p"),
        "--manifest",
        str(asked / "manifest.jsonl"),
        "--out",
        str(tmp_path / "o"),
        *JUDGES,
    ]
    assert main(argv) == 2
    assert "1 of 6 have no picture" in capsys.readouterr().err
    assert main([*argv, "--allow-missing"]) == 0
    scores = Scores.load(tmp_path / "o")
    assert scores.missing == ["01", "02"] and len(scores.cases) == 4
    assert any("02.png" in p for p in scores.problems)
    assert "2 pictures are missing" in (tmp_path / "o" / "report.html").read_text()


def test_a_reference_without_a_face_is_a_problem_not_a_zero(asked, tmp_path):
    from PIL import Image

    shutil.copytree(asked, tmp_path / "a")
    Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "a" / "references" / "0a.png")
    argv = [
        "evaluate",
        "--pictures",
        str(tmp_path / "a" / "right"),
        "--manifest",
        str(tmp_path / "a" / "manifest.jsonl"),
    ]
    assert main([*argv, "--out", str(tmp_path / "o"), *JUDGES]) == 0
    scores = Scores.load(tmp_path / "o")
    assert np.isnan(scores.values("face_sim")[0]) and np.isfinite(scores.values("face_sim")[1:]).all()
    assert any("0a.png shows no face" in p for p in scores.problems)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["evaluate", "--pictures", "{asked}/right"], "--manifest"),
        (
            [
                "evaluate",
                "--pictures",
                "{asked}/right",
                "--manifest",
                "{asked}/manifest.jsonl",
                "--out",
                "{tmp}/x.json",
            ],
            "--out must be a folder",
        ),
        (
            [
                "evaluate",
                "--pictures",
                "{asked}/right",
                "--manifest",
                "{asked}/manifest.jsonl",
                "--out",
                "{tmp}/x",
                "--clip",
                "/nowhere",
            ],
            "/nowhere",
        ),
        (
            [
                "evaluate",
                "--pictures",
                "{asked}/right",
                "--manifest",
                "{asked}/manifest.jsonl",
                "--out",
                "{tmp}/x",
                "--aesthetics",
                "hps",
            ],
            "hps:PATH",
        ),
        (["compare", "{tmp}", "{tmp}"], "there is none"),
        (["compare", "{asked}/manifest.jsonl", "{asked}/manifest.jsonl"], "written by multicrafter evaluate"),
        (["leaderboard", "{tmp}", "--out", "{tmp}/x.txt"], ".html or .md"),
    ],
)
def test_what_cannot_work_is_one_sentence(asked, tmp_path, capsys, argv, words):
    assert main([a.format(asked=asked, tmp=tmp_path) for a in argv]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0], errors
