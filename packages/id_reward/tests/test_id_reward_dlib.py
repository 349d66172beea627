"""The dlib backend on real photos."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("dlib", reason="needs id-reward[dlib]")
from id_reward import FaceBackend, IdentityScorer
from id_reward.backends.faces import get_face_backend
from id_reward.backends.faces.center import center, mean_face
from id_reward.backends.faces.dlib_faces import DlibBackend
from id_reward.images import open_image
from PIL import Image

MAN = [f"face-recognition/{n}.jpg" for n in ("obama", "obama2", "obama3")]


@pytest.fixture(scope="module")
def backend() -> DlibBackend:
    found = get_face_backend("auto")
    assert isinstance(found, DlibBackend) and isinstance(found, FaceBackend)
    return found


def test_it_counts_the_faces(dlib_faces) -> None:
    counts = {name.split("/")[1]: len(faces.boxes) for name, faces in dlib_faces.items()}
    assert counts["t1.jpg"] == 6
    assert counts["astronaut.png"] == counts["obama.jpg"] == counts["biden.jpg"] == 1
    assert counts["sample3.jpg"] == 3 and counts["sample6.jpg"] == 4
    assert counts["chelsea.png"] == counts["coffee.png"] == counts["rocket.jpg"] == 0


def test_same_person_is_nearer_than_different_people(dlib_faces) -> None:
    man = np.concatenate([dlib_faces[name].embeddings for name in MAN])
    same = [man[i] @ man[j] for i, j in itertools.combinations(range(3), 2)]
    people = [dlib_faces["insightface/t1.jpg"].embeddings, dlib_faces["face-api/sample6.jpg"].embeddings]
    different = [row @ other for group in people for row, other in itertools.combinations(group, 2)]
    different += [e @ dlib_faces["face-recognition/biden.jpg"].embeddings[0] for e in man]
    different += [e @ dlib_faces["scikit-image/astronaut.png"].embeddings[0] for e in man]
    assert min(same) > DlibBackend.same_person > max(different)
    assert min(same) - max(different) > 0.25


def test_embeddings_are_unit_and_centred(dlib_faces) -> None:
    for faces in dlib_faces.values():
        assert faces.embeddings.shape == (len(faces.boxes), 128)
        np.testing.assert_allclose(np.linalg.norm(faces.embeddings, axis=1), 1, atol=1e-9)
        assert ((faces.scores > 0.5) & (faces.scores < 1)).all()
    everyone = np.concatenate([faces.embeddings for faces in dlib_faces.values() if len(faces.boxes)])
    assert np.linalg.norm(everyone.mean(0)) < 0.5  # raw descriptors: .93
    np.testing.assert_allclose(center(mean_face()[None] + np.eye(1, 128)), np.eye(1, 128), atol=1e-6)


def test_boxes_are_pixels_of_the_original_picture(backend, photos, dlib_faces) -> None:
    box = dlib_faces["scikit-image/astronaut.png"].boxes[0]
    assert 170 < (box[0] + box[2]) / 2 < 280 and 60 < (box[1] + box[3]) / 2 < 180  # where her face is
    astronaut = open_image(photos / "scikit-image" / "astronaut.png")
    large = backend.align(astronaut.resize((1536, 1536))).boxes[0]
    np.testing.assert_allclose(large / 3, box, atol=15)


def test_colour_order_is_rgb(backend, photos, dlib_faces) -> None:
    """Red and blue swapped is another picture: the embedding moves, so the order matters and RGB is the one that fits."""
    picture = np.asarray(open_image(photos / MAN[0]))
    (swapped,) = backend.detect_and_embed([picture[..., ::-1]])
    right = dlib_faces[MAN[0]].embeddings[0] @ dlib_faces[MAN[1]].embeddings[0]
    assert swapped.embeddings[0] @ dlib_faces[MAN[1]].embeddings[0] < right


def test_a_turned_head_is_aligned(backend, photos, dlib_faces) -> None:
    """Alignment undoes a rotation in the plane, which the bare crop would not."""
    turned = open_image(photos / MAN[0]).rotate(15, Image.Resampling.BILINEAR)
    (faces,) = backend.detect_and_embed([turned])
    assert faces.embeddings[0] @ dlib_faces[MAN[0]].embeddings[0] > 0.9


def test_a_batch_equals_one_by_one(backend, photos, dlib_faces) -> None:
    names = ["scikit-image/chelsea.png", "scikit-image/astronaut.png"]
    for name in names:
        (faces,) = backend.detect_and_embed([photos / name])
        np.testing.assert_allclose(faces.embeddings, dlib_faces[name].embeddings, atol=1e-6)
        np.testing.assert_allclose(faces.boxes, dlib_faces[name].boxes)
    assert backend.detect_and_embed([]) == []


def test_one_worker_finds_what_many_find(photos, dlib_faces) -> None:
    (faces,) = DlibBackend(workers=1).detect_and_embed([photos / "scikit-image/astronaut.png"])
    np.testing.assert_allclose(faces.embeddings, dlib_faces["scikit-image/astronaut.png"].embeddings, atol=1e-6)
    with pytest.raises(ValueError, match="embedder"):
        DlibBackend(embedder=None).detect_and_embed([photos / "scikit-image/astronaut.png"])


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (16, 16), (3, 2000)])
def test_pictures_without_room_for_a_face_have_none(backend, size) -> None:
    (faces,) = backend.detect_and_embed([Image.new("RGB", size)])
    assert faces.boxes.shape == (0, 4) and faces.embeddings.shape == (0, 128)


def test_the_reward_on_real_faces(photos, dlib_faces) -> None:
    """A photo of both men scores near 1, of one of them half, of strangers low."""

    class Known:
        def detect_and_embed(self, images):
            return [images_faces for images_faces in images]

    scorer = IdentityScorer(Known())  # type: ignore[arg-type]
    first, second, biden = dlib_faces[MAN[0]], dlib_faces[MAN[1]], dlib_faces["face-recognition/biden.jpg"]
    both = type(first)(*(np.concatenate(pair) for pair in zip(second, biden)))
    rewards = scorer([both, second, dlib_faces["insightface/t1.jpg"]], [""] * 3, [[first, biden]] * 3)
    assert rewards[0] > 0.9 and 0.35 < rewards[1] < 0.55 and rewards[2] < 0.45
    assert rewards[0] > rewards[1] > rewards[2] or rewards[0] > rewards[2]


@pytest.mark.parametrize(
    ("options", "word"), [({"side": 10}, "side"), ({"workers": 0}, "workers"), ({"embedder": "onnx"}, "embedder")]
)
def test_bad_options_are_named(options, word) -> None:
    with pytest.raises(ValueError, match=word):
        DlibBackend(**options)
    with pytest.raises(ValueError, match="name"):
        get_face_backend("retina")  # type: ignore[arg-type]
