"""Somebody who is on a photo but was not found has no mask: such photos are no targets, unless one says so."""

from __future__ import annotations

import numpy as np
import pytest
from multicrafter.photos import FilterConfig, build, counting
from multicrafter.photos.config import resolve
from multicrafter.photos.counting import strangers
from multicrafter.photos.people import face_backend

A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)


@pytest.mark.parametrize(
    ("counted", "accounted", "alone"),
    [
        ([A, B, C], [A], [B, C]),
        ([A, B, C], [A, B, C], []),
        ([], [A], []),
        ([A], [], [A]),
        ([(-2, -2, 12, 60)], [A], []),  # a body under a face
        ([A], [(-2, -2, 12, 60)], []),
        ([(-2, -2, 12, 60), (18, -2, 32, 60)], [A], [(18, -2, 32, 60)]),
        ([(0, 0, 10, 10), (1, 1, 11, 11)], [A], []),  # one face found twice
        ([(7, 7, 17, 17)], [A], [(7, 7, 17, 17)]),
    ],
)
def test_strangers_are_those_over_nobody(counted, accounted, alone):
    assert strangers(counted, accounted) == alone


def test_the_second_means_is_another_one():
    assert {f: resolve("auto", f) for f in ("dlib", "insightface", "dlib_cnn", "tiny")} == {
        "dlib": "dlib_cnn", "insightface": "dlib_cnn", "dlib_cnn": "dlib", "tiny": "none",
    }  # fmt: skip
    assert resolve("none", "dlib") == "none"


class OneOfTwo:
    """The drawn world's backend, short-sighted: it sees only the person furthest to the left."""

    name = "short-sighted"

    def __init__(self):
        self.inner = face_backend("tiny")

    def detect_and_embed(self, pictures):
        from id_reward import Faces

        found = []
        for faces in self.inner.detect_and_embed(pictures):
            order = np.argsort(faces.boxes[:, 0])[:1]
            found.append(Faces(faces.boxes[order], faces.scores[order], faces.embeddings[order]))
        return found


@pytest.fixture
def short_sighted(monkeypatch):
    """Detection finds one of two; the second means finds both."""
    full = face_backend("tiny")

    def count(pictures):
        return [[tuple(b) for b in faces.boxes.tolist()] for faces in full.detect_and_embed(pictures)]

    seen = OneOfTwo()
    monkeypatch.setattr("multicrafter.photos.people.face_backend", lambda name: seen)
    monkeypatch.setattr(counting, "people_counter", lambda name: count if name == "dlib_cnn" else None)


def test_a_photo_of_two_of_whom_one_is_found_is_no_target(few, make_config, tmp_path, short_sighted):
    summary = build(few, tmp_path / "a", make_config(count="dlib_cnn"), progress=False)
    assert summary.counts["count: people without a mask"] == 6
    assert sum(summary.records.values()) == 0
    assert {d.detail for d in summary.drops if d.stage == "count"} == {"2 people counted, 1 with a mask"}
    filters = FilterConfig(min_side=32, min_face_pixels=4, duplicate_distance=2, strangers="keep")
    kept = build(few, tmp_path / "b", make_config(count="dlib_cnn", filter=filters), progress=False)
    assert sum(kept.records.values()) > 0
    assert "count: people without a mask" not in kept.counts


def test_everybody_found_is_a_target_as_before(few, make_config, tmp_path, monkeypatch):
    full = face_backend("tiny")
    counter = lambda pictures: [[tuple(b) for b in f.boxes.tolist()] for f in full.detect_and_embed(pictures)]  # noqa: E731
    monkeypatch.setattr(counting, "people_counter", lambda name: counter)
    want = build(few, tmp_path / "a", make_config(count="none"), progress=False)
    got = build(few, tmp_path / "b", make_config(count="dlib_cnn"), progress=False)
    assert got.records == want.records
    assert sum(got.records.values()) > 0


def test_a_face_that_is_found_but_too_small_is_a_stranger_too(few, make_config, tmp_path):
    from multicrafter.photos.people import Face
    from multicrafter.photos.run import BuildRun
    from multicrafter.photos.scan import PhotoNote
    from multicrafter.photos.select import Photo, sort_faces

    config = make_config(count="none", filter=FilterConfig(min_side=32, min_face_pixels=8))
    faces = [Face(i, box, box, 1.0, np.ones(2)) for i, box in enumerate([(0, 0, 20, 20), (40, 0, 44, 4)])]
    photo = Photo("a.png", "a", 64, 64, 0, 1.0, PhotoNote(), "", faces=faces)
    sort_faces(photo, config.filter, config.privacy)
    run = BuildRun.__new__(BuildRun)
    run.photos, run.config, run.drops, run.timing = few, config, [], {}
    run.stage = lambda stage, jobs: ({job.key: {"boxes": []} for job in jobs}, "")
    assert run.without_strangers([photo]) == []
    assert run.drops[0].detail == "2 people counted, 1 with a mask"
    photo.hidden.append(faces[1].box)
    assert run.without_strangers([photo]) == [photo], "who is pixelated is nobody to be taught"


@pytest.mark.slow
def test_dlib_cnn_finds_what_hog_finds_and_embeds_alike():
    skimage = pytest.importorskip("skimage.data", reason="needs scikit-image")
    pytest.importorskip("dlib", reason="needs id-reward[dlib]")
    from multicrafter.photos.counting import people_counter
    from PIL import Image

    picture = Image.fromarray(skimage.astronaut())
    hog, cnn = (face_backend(n).detect_and_embed([picture])[0] for n in ("dlib", "dlib_cnn"))
    assert len(hog.boxes) == len(cnn.boxes) == 1
    assert float(hog.embeddings[0] @ cnn.embeddings[0]) > 0.9
    assert strangers(people_counter("dlib_cnn")([picture])[0], [tuple(hog.boxes[0])]) == []
    assert people_counter("dlib_cnn")([Image.fromarray(skimage.coffee())]) == [[]]
