"""The insightface backend on tiny packs in the real format, against insightface's own FaceAnalysis."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("insightface", reason="needs id-reward[insightface]")
pytest.importorskip("onnxruntime", reason="needs id-reward[insightface]")
from id_reward import FaceBackend, get_face_backend
from id_reward.backends.faces import insightface_faces
from insightface.app import FaceAnalysis

spec = importlib.util.spec_from_file_location("tiny_onnx", Path(__file__).with_name("tiny_onnx.py"))
assert spec and spec.loader
tiny_onnx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_onnx)

PLACES = [(168, 168), (408, 328), (248, 520)]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_onnx.pack(tmp_path_factory.mktemp("pack") / "tiny")


@pytest.fixture(scope="module")
def backend(folder):
    return get_face_backend("insightface", model=folder)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [tiny_onnx.picture(*PLACES), tiny_onnx.picture(seed=1), tiny_onnx.picture(PLACES[1], seed=2)]


def test_faces_are_where_the_squares_are(backend, pictures) -> None:
    assert isinstance(backend, FaceBackend) and backend.dim == 512
    three, none, one = backend.detect_and_embed(pictures)
    centres = {tuple(c) for c in ((three.boxes[:, :2] + three.boxes[:, 2:]) / 2 + 8).astype(int).tolist()}
    assert centres == set(PLACES) and len(one.boxes) == 1
    assert none.boxes.shape == (0, 4) and none.embeddings.shape == (0, 512)
    np.testing.assert_allclose(np.linalg.norm(three.embeddings, axis=1), 1)
    assert backend.detect_and_embed([]) == []


def test_it_agrees_with_face_analysis(backend, folder, pictures) -> None:
    """Same boxes, scores and embeddings as insightface's own loop, which takes BGR."""
    application = FaceAnalysis(name=str(folder))
    application.prepare(0)
    for picture, faces in zip(pictures, backend.detect_and_embed(pictures), strict=True):
        theirs = application.get(np.ascontiguousarray(picture[..., ::-1]))
        assert len(theirs) == len(faces.boxes)
        for row, face in enumerate(theirs):
            np.testing.assert_allclose(faces.boxes[row], face.bbox, atol=1e-4)
            np.testing.assert_allclose(faces.embeddings[row], face.normed_embedding, atol=1e-5)
    assert len(application.models) > 2


def test_only_detection_and_recognition_run_and_faces_are_batched(folder, pictures, monkeypatch) -> None:
    backend = get_face_backend("insightface", model=folder)
    sizes: list[int] = []
    original = backend.recognizer.get_feat
    monkeypatch.setattr(backend.recognizer, "get_feat", lambda chips: sizes.append(len(chips)) or original(chips))
    from insightface.model_zoo.attribute import Attribute
    from insightface.model_zoo.landmark import Landmark

    for other in (Attribute, Landmark):
        monkeypatch.setattr(other, "get", lambda *_: pytest.fail("a model that is not needed ran"))
    backend.detect_and_embed(pictures)
    assert sizes == [4]  # three faces of the first picture and one of the third, in one call


def test_a_graph_for_one_face_works_too(tmp_path, backend, pictures) -> None:
    single = get_face_backend("insightface", model=tiny_onnx.pack(tmp_path / "one", batch=1))
    for a, b in zip(single.detect_and_embed(pictures), backend.detect_and_embed(pictures), strict=True):
        np.testing.assert_allclose(a.embeddings, b.embeddings, atol=1e-5)


def test_a_pack_by_name_also_nested(tmp_path, pictures) -> None:
    tiny_onnx.pack(tmp_path / "models" / "buffalo_x" / "buffalo_x")
    backend = get_face_backend("insightface", model="buffalo_x", root=tmp_path)
    assert len(backend.detect_and_embed(pictures)[0].boxes) == 3


def test_a_missing_pack_is_one_sentence_that_says_where_and_under_which_licence(tmp_path) -> None:
    with pytest.raises(ValueError) as caught:
        get_face_backend("insightface", root=tmp_path / "face")
    message = str(caught.value)
    assert str(tmp_path / "face" / "models" / "buffalo_l") in message
    assert "non-commercial" in message and "\n" not in message
    assert not (tmp_path / "face").exists()


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    import insightface.utils.storage as storage

    def offline(url, path, overwrite):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"half a file")
        raise ConnectionError("no route")

    monkeypatch.setattr(storage, "download_file", offline)
    with pytest.raises(ValueError, match="ConnectionError"):
        get_face_backend("insightface", root=tmp_path / "face", download=True)
    assert not (tmp_path / "face").exists()
    kept = tmp_path / "other" / "models" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("stays")
    with pytest.raises(ValueError, match="ConnectionError"):
        get_face_backend("insightface", root=tmp_path / "other", download=True)
    assert [p.name for p in kept.parent.iterdir()] == ["mine.txt"]


def test_folders_without_what_is_needed_are_named(tmp_path) -> None:
    tiny_onnx.network(tmp_path / "w600k_r50.onnx", side=112, dim=8)
    with pytest.raises(ValueError, match="detection"):
        get_face_backend("insightface", model=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "det.onnx").write_bytes(b"not a graph")
    with pytest.raises(ValueError, match="broken"):
        get_face_backend("insightface", model=tmp_path / "broken")
    tiny_onnx.pack(tmp_path / "pointless", points=False)
    with pytest.raises(ValueError, match="five points"):
        get_face_backend("insightface", model=tmp_path / "pointless")


def test_a_missing_extra_names_the_pip_line(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install .id-reward\[insightface\]"):
        insightface_faces.InsightFaceBackend(model=tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (16, 16)])
def test_pictures_without_room_have_no_faces(backend, size) -> None:
    (faces,) = backend.detect_and_embed([np.zeros((*size, 3), np.uint8)])
    assert len(faces.boxes) == 0
