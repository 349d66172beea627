"""A reference in which no face is found: looked at more closely, then said once and by name, never NaN without a word."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
from id_reward import CompositeReward, Faces, IdentityScorer

PEOPLE = np.eye(4)


class Timid:
    """Pictures are arrays (f, d) of embeddings; in references it also sees the negatives of faces."""

    def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
        rows = [np.asarray(i)[np.asarray(i).sum(1) > 0] for i in images]
        return [Faces(np.tile([0.0, 0, 1, 1], (len(r), 1)), np.ones(len(r)), r) for r in rows]


class Careful(Timid):
    def detect_and_embed_references(self, images):  # type: ignore[no-untyped-def]
        return self.detect_and_embed([abs(i) for i in images])


def test_a_reference_without_a_face_is_named_once() -> None:
    scorer = IdentityScorer(Timid())
    with pytest.warns(UserWarning, match="none was found") as caught:
        first = scorer([PEOPLE[:1]] * 3, [""] * 3, [[PEOPLE[:1], -PEOPLE[1:2]]] * 3)
    assert np.isnan(first).all()
    assert [str(w.message) for w in caught] == [
        "reference 2 must show a face, but none was found: every picture that it is a reference of gets NaN"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer([PEOPLE[:1]], [""], [[PEOPLE[:1], -PEOPLE[1:2]]])


def test_a_backend_may_look_closer_at_references_than_at_pictures() -> None:
    scorer = IdentityScorer(Careful())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scorer([PEOPLE[:1], -PEOPLE[:1]], [""] * 2, [[-PEOPLE[:1]]] * 2).tolist() == [1, 0]


def test_pictures_without_references_are_counted() -> None:
    with pytest.warns(UserWarning, match="2 of 3 pictures have no references, picture 1 for one: their reward is NaN"):
        found = IdentityScorer(Timid())([PEOPLE[:1]] * 3, [""] * 3, [[PEOPLE[:1]], [], []])
    assert found[0] == 1 and np.isnan(found[1:]).all()


def test_a_part_that_is_nan_for_every_picture_is_said_by_the_composite() -> None:
    reward = CompositeReward(
        {"face": (lambda i, p, r: np.full(len(i), np.nan), 1.0), "text": (lambda i, p, r: np.ones(len(i)), 1.0)}
    )
    with pytest.warns(UserWarning, match="face has no value for any of the 2 pictures"):
        assert np.isnan(reward([0, 0], ["", ""], [[], []]).totals).all()


def test_files_are_named(tmp_path) -> None:
    pytest.importorskip("PIL", reason="needs id-reward[image]")
    from PIL import Image

    class Blind:
        def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
            return [Faces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 4))) for _ in images]

    Image.new("RGB", (8, 8)).save(tmp_path / "anna.png")
    for reference in (
        tmp_path / "anna.png",
        str(tmp_path / "anna.png"),
        Image.open(tmp_path / "anna.png"),
        {"bytes": None, "path": str(tmp_path / "anna.png")},
    ):
        with pytest.warns(UserWarning, match=r"anna\.png must show a face"):
            IdentityScorer(Blind())([PEOPLE], [""], [[reference]])
        with pytest.raises(ValueError, match=r"anna\.png must show a face"):
            IdentityScorer(Blind(), no_face="error")([PEOPLE], [""], [[reference]])


@pytest.mark.parametrize("name", [pytest.param("dlib", marks=pytest.mark.slow), "torch"])  # one detector for both
def test_dlib_finds_a_stretched_portrait_as_a_reference(photos, dlib_faces, name) -> None:
    """Its detector gives the face .26: too little for a picture, enough for a photo of which a face is known to be in it."""
    if name == "torch":
        pytest.importorskip("torch", reason="needs id-reward[torch]")
    from id_reward import get_face_backend
    from id_reward.images import open_image

    portrait = open_image(photos / "face-recognition/obama.jpg")
    stretched = portrait.resize((portrait.width, 2 * portrait.height))
    backend = get_face_backend(name)  # type: ignore[arg-type]
    assert len(backend.detect_and_embed([stretched])[0].boxes) == 0
    (found,) = backend.detect_and_embed_references([stretched])  # type: ignore[attr-defined]
    assert len(found.boxes) == 1
    rewards = IdentityScorer(backend)([portrait], [""], [[stretched]])
    assert rewards[0] == pytest.approx(
        found.embeddings[0] @ dlib_faces["face-recognition/obama.jpg"].embeddings[0], abs=1e-5
    )
    assert rewards[0] > 0.5
    strict = get_face_backend(name, reference_threshold=0.3)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="must show a face"):
        assert np.isnan(IdentityScorer(strict)([portrait], [""], [[stretched]])[0])
    (cat,) = backend.detect_and_embed_references([photos / "scikit-image/chelsea.png"])  # type: ignore[attr-defined]
    assert len(cat.boxes) == 0
    (group,) = backend.detect_and_embed_references([photos / "insightface/t1.jpg"])  # type: ignore[attr-defined]
    assert len(group.boxes) == 6  # where faces are found, nothing below the threshold joins them


def test_insightface_too(tmp_path) -> None:
    pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("insightface", reason="needs id-reward[insightface]")
    spec = importlib.util.spec_from_file_location("tiny_onnx", Path(__file__).with_name("tiny_onnx.py"))
    assert spec and spec.loader
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    from id_reward.backends.faces.insightface_faces import InsightFaceBackend

    dim = tiny.picture((200, 200))
    dim[dim == 255] = 248  # the tiny detector's score is .41
    pack = tiny.pack(tmp_path / "pack")
    backend = InsightFaceBackend(model=pack, providers=["CPUExecutionProvider"], det_size=(640, 640))
    assert len(backend.detect_and_embed([dim])[0].boxes) == 0
    (found,) = backend.detect_and_embed_references([dim])
    assert len(found.boxes) == 1 and 0.3 < found.scores[0] < 0.5
    assert len(backend.detect_and_embed_references([tiny.picture((200, 200), (408, 408))])[0].boxes) == 2
    with pytest.raises(ValueError, match="reference_threshold"):
        InsightFaceBackend(model=pack, reference_threshold=2)


@pytest.mark.slow
def test_the_command_line_takes_both_thresholds(photos, tmp_path, capsys) -> None:
    pytest.importorskip("dlib", reason="needs id-reward[dlib]")
    from id_reward.cli import main
    from id_reward.images import open_image

    portrait = open_image(photos / "face-recognition/obama.jpg")
    portrait.resize((portrait.width, 2 * portrait.height)).save(tmp_path / "stretched.png")
    given = ["score", "-r", str(tmp_path / "stretched.png"), str(photos / "face-recognition/obama.jpg")]
    assert main([*given, "--quiet"]) == 0
    assert main([*given, "--reference-threshold", "0.3"]) == 2
    assert "stretched.png must show a face" in capsys.readouterr().err
    assert main([*given, "--threshold", "5", "--json"]) == 0
    assert '"faces": []' in capsys.readouterr().out
    assert main([*given, "--threshold", "nan"]) == 2
