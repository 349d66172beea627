"""The command line on real photos, and on input that is wrong."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

pytest.importorskip("dlib", reason="needs id-reward[dlib]")
from id_reward.alignment import score_similarity
from id_reward.annotate import annotate
from id_reward.cli import main
from id_reward.protocols import Faces
from PIL import Image


@pytest.fixture
def files(photos):
    return {
        "man": str(photos / "face-recognition/obama.jpg"),
        "again": str(photos / "face-recognition/obama2.jpg"),
        "other": str(photos / "face-recognition/biden.jpg"),
        "group": str(photos / "insightface/t1.jpg"),
        "cat": str(photos / "scikit-image/chelsea.png"),
    }


def test_table_json_and_annotated_pictures(files, tmp_path, capsys) -> None:
    arguments = [
        "score",
        "-r",
        files["man"],
        "--reference",
        files["other"],
        files["again"],
        files["cat"],
        "--all-conventions",
    ]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--annotate", str(tmp_path / "drawn")]) == 0
    printed, progress = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0].split()[:5] == ["picture", "reward", "faces", "obama", "biden"]
    first = dict(zip(lines[0].split(), lines[2].split()))
    assert (
        first["picture"] == "obama2"
        and float(first["obama"]) > 0.8
        and first["biden"] == "-"
        and first["missing"] == "1"
    )
    assert "scoring 2 of 2" in progress
    content = json.loads((tmp_path / "out.json").read_text())
    picture, cat = content["pictures"]
    assert picture["reward"] == pytest.approx(picture["per_reference"][files["man"]] / 2, abs=1e-5)
    assert picture["missing"] == [files["other"]] and picture["faces"][0]["reference"] == files["man"]
    assert picture["conventions"]["withanyone"] is None  # NaN is no JSON
    assert cat["reward"] == 0 and cat["faces"] == [] and len(cat["missing"]) == 2
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {"obama2.png", "chelsea.png"}
    assert Image.open(tmp_path / "drawn" / "obama2.png").size[0] > 500


def test_json_on_standard_output_is_nothing_but_json(files, capsys) -> None:
    assert main(["score", "-r", files["man"], files["again"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"][0]["reward"] > 0.8


@pytest.mark.parametrize(("reference", "picture", "word"), [
    ("cat", "man", "chelsea.png must show a face"),
    ("man", "nothing.jpg", "nothing.jpg must be a picture"),
    ("nothing.jpg", "man", "nothing.jpg must be a picture"),
    ("broken.jpg", "man", "broken.jpg must be a readable picture"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_code_2(files, tmp_path, capsys, reference, picture, word) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    given = [files.get(name, str(tmp_path / name)) for name in (reference, picture)]
    assert main(["score", "-r", given[0], given[1]]) == 2
    printed, message = capsys.readouterr()
    assert printed == "" and word in message and "Traceback" not in message
    assert message.strip().count("\n") == 0


def test_several_faces_in_a_reference(files, capsys) -> None:
    assert main(["score", "-r", files["group"], files["man"]]) == 0
    assert "t1.jpg must show one face, got 6; the largest is taken" in capsys.readouterr().err
    assert main(["score", "-r", files["group"], files["man"], "--one-face"]) == 2
    assert "t1.jpg must show one face, got 6" in capsys.readouterr().err


def test_wrong_options(files, capsys) -> None:
    assert main(["score", "-r", files["man"], files["man"], "--missing-penalty", "-1"]) == 2
    assert "missing_penalty" in capsys.readouterr().err
    assert main(["score", "-r", files["man"], files["man"], "--model", "x"]) == 2
    assert main(["score", "-r", files["man"], files["man"], "--backend", "insightface", "--model", "/nowhere"]) == 2
    installed = importlib.util.find_spec("insightface") and importlib.util.find_spec("onnxruntime")
    assert ("non-commercial" if installed else "id-reward[insightface]") in capsys.readouterr().err
    for wrong in ([], ["score"], ["score", "a.jpg"], ["score", "-r", "a.jpg", "b.jpg", "--backend", "magic"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2


def test_the_drawing_shows_who_is_who() -> None:
    """Pixels of the box have the colour of the reference's frame; nobody's face is gray."""
    faces = Faces(np.array([[10.0, 10, 40, 40], [60, 10, 90, 40]]), np.ones(2), np.eye(2, 3))
    score = score_similarity(np.array([[0.9, -0.5], [-0.5, -0.5]]))
    white = np.full((100, 100, 3), 255, np.uint8)
    sheet = np.asarray(annotate(white, faces, score, [white, white], ["a", "b"]))
    blue, orange, gray = (0, 114, 178), (230, 159, 0), (128, 128, 128)
    at = lambda x, y: tuple(sheet[round(y * 7.68), round(x * 7.68)])  # noqa: E731
    assert at(40, 25) == blue and at(90, 25) == gray
    assert tuple(sheet[5, 768 + 20]) == blue
    assert (sheet == orange).all(-1).any() and (sheet == (180, 0, 0)).all(-1).any()  # the missing one, crossed out
