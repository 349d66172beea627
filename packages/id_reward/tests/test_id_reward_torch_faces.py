"""The differentiable face network: against dlib, its gradients, its crops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
pytest.importorskip("dlib", reason="needs id-reward[dlib]")
import torch
from id_reward import FaceBackend, get_face_backend
from id_reward.backends.faces import dlib_weights, torch_faces
from id_reward.backends.faces.dlib_faces import DlibBackend, model_folder
from id_reward.images import as_array

GROUP, MAN, OTHER = "insightface/t1.jpg", "face-recognition/obama.jpg", "face-recognition/obama2.jpg"


@pytest.fixture(scope="module")
def backend(photos):
    return get_face_backend("torch")


@pytest.fixture(scope="module")
def aligned(backend, photos):
    return backend.detector.align(photos / GROUP)


def tensor(chips: np.ndarray):  # type: ignore[no-untyped-def]
    return torch.from_numpy(chips).permute(0, 3, 1, 2).float() / 255


def picture(path: Path):  # type: ignore[no-untyped-def]
    return torch.from_numpy(as_array(path).copy()).permute(2, 0, 1).float() / 255


def test_it_is_dlibs_network(backend, aligned) -> None:
    """The weights read from dlib's file give dlib's own descriptors; dlib is the oracle."""
    chips = aligned.chips[:2]
    oracle = DlibBackend(embedder="dlib").describe(chips)
    np.testing.assert_allclose(backend.network(tensor(chips)).numpy(), oracle, atol=2e-6)


def test_the_quantised_weights_are_the_same_network(backend, aligned, photos) -> None:
    small = torch_faces.load_network(photos / "face-api" / "model")
    with torch.inference_mode():
        theirs = torch_faces.center(small(tensor(aligned.chips)))
        ours = backend.embed(tensor(aligned.chips))
    assert (theirs * ours).sum(1).min() > 0.995
    for a, b in zip(
        dlib_weights.read_face_api(photos / "face-api" / "model").convolutions,
        dlib_weights.read_dlib(model_folder() / "dlib_face_recognition_resnet_model_v1.dat").convolutions,
        strict=True,
    ):
        # quantised by 255 steps between minimum and maximum
        assert np.abs(a.filters - b.filters).max() <= np.ptp(b.filters) / 255


def test_people_are_told_apart_with_the_quantised_weights(photos, dlib_faces) -> None:
    backend = get_face_backend("torch", weights=photos / "face-api" / "model")
    assert isinstance(backend, FaceBackend)
    first, second, group = backend.detect_and_embed([photos / MAN, photos / OTHER, photos / GROUP])
    assert len(group.boxes) == 6
    assert first.embeddings[0] @ second.embeddings[0] > backend.same_person
    assert (group.embeddings @ first.embeddings[0]).max() < backend.same_person
    # references embedded by one backend serve the other
    assert first.embeddings[0] @ dlib_faces[MAN].embeddings[0] > 0.99


def test_the_backends_agree(backend, photos, dlib_faces) -> None:
    (faces,) = backend.detect_and_embed([photos / GROUP])
    np.testing.assert_allclose(faces.boxes, dlib_faces[GROUP].boxes)
    np.testing.assert_allclose(faces.embeddings, dlib_faces[GROUP].embeddings, atol=1e-5)


def test_crops_are_dlibs_crops(backend, aligned, photos) -> None:
    """Also of heads turned by half a radian; dlib rounds down to 8 bits."""
    crops = torch_faces.crop_faces(picture(photos / GROUP), aligned.frames)
    assert np.abs(aligned.frames[:, 3]).max() > 0.4
    assert (crops - tensor(aligned.chips)).abs().mean((1, 2, 3)).max() < 0.004
    large = backend.detector.align(photos / MAN)
    crops = torch_faces.crop_faces(picture(photos / MAN), large.frames)
    with torch.inference_mode():
        assert (backend.embed(crops) * backend.embed(tensor(large.chips))).sum() > 0.99


def test_gradients_are_right(backend, aligned) -> None:
    """Against differences of the double-precision network, along random directions."""
    network = torch_faces.load_network().double()
    chip = tensor(aligned.chips[:1]).double().requires_grad_()
    known = torch.nn.functional.normalize(
        torch.randn(128, dtype=torch.double, generator=torch.Generator().manual_seed(0)), dim=0
    )
    value = lambda x: (torch_faces.center(network(x)) @ known).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(chip), chip)
    for seed in range(2):
        direction = torch.randn(chip.shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        step = 1e-8  # small: a larger one crosses kinks of the ReLUs
        difference = (value(chip + step * direction) - value(chip - step * direction)) / (2 * step)
        assert float(difference.detach()) == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


def test_the_reward_pulls_a_picture_towards_its_reference(backend, photos, dlib_faces) -> None:
    """Some ascent steps on the pixels make one man's face more like another's, and only around the face."""
    image = picture(photos / "scikit-image" / "astronaut.png")[None].requires_grad_()
    known = dlib_faces["face-recognition/biden.jpg"].embeddings
    score = backend.reward(image, [known])
    assert score.found.tolist() in ([0.0], [1.0])
    plain = backend.similarity(image[0], known)
    (gradient,) = torch.autograd.grad(plain.sum(), image)
    box = dlib_faces["scikit-image/astronaut.png"].boxes[0].round().astype(int)
    inside = gradient[0, :, box[1] : box[3], box[0] : box[2]].abs().sum()
    assert inside > 0.5 * gradient.abs().sum() and gradient[0, :, 300:, :].abs().sum() == 0
    moved = (image + 0.02 * gradient.sign()).clamp(0, 1).detach()
    assert backend.similarity(moved[0], known)[0, 0] > plain[0, 0] + 0.05
    assert all(p.grad is None and not p.requires_grad for p in backend.network.parameters())


def test_the_reward_is_the_matched_cosine(backend, photos, dlib_faces) -> None:
    image = picture(photos / GROUP)[None]
    known = dlib_faces[GROUP].embeddings[[4, 1]]
    score = backend.reward(image, [known])
    assert float(score.reward[0]) == pytest.approx(1, abs=0.01) and score.found.tolist() == [2]
    stranger = np.vstack([known, dlib_faces[MAN].embeddings])
    from id_reward import multi_id_alignment_reward

    expected = multi_id_alignment_reward(stranger, dlib_faces[GROUP].embeddings).reward
    assert float(backend.reward(image, [stranger]).reward[0]) == pytest.approx(expected, abs=0.01)
    empty = backend.reward(torch.zeros(1, 3, 64, 64, requires_grad=True), [known])
    assert float(empty.reward[0]) == 0 and empty.reward.requires_grad
    with pytest.raises(ValueError, match="references"):
        backend.reward(image, [])


def test_files_that_are_not_the_network_are_named(tmp_path, photos) -> None:
    (tmp_path / "x.dat").write_bytes(b"no network" * 10)
    with pytest.raises(ValueError, match=r"x\.dat must be dlib_face_recognition_resnet_model_v1\.dat"):
        torch_faces.load_network(tmp_path / "x.dat")
    whole = (model_folder() / "dlib_face_recognition_resnet_model_v1.dat").read_bytes()
    (tmp_path / "cut.dat").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must fit"):
        torch_faces.load_network(tmp_path / "cut.dat")
    with pytest.raises(ValueError, match="npm pack"):
        torch_faces.load_network(tmp_path)
    manifest = photos / "face-api" / "model" / "face_recognition_model-weights_manifest.json"
    (tmp_path / manifest.name).write_text(json.dumps(json.loads(manifest.read_text())[:1]))
    (tmp_path / "face_recognition_model.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="face_recognition_model"):
        torch_faces.load_network(tmp_path)
    with pytest.raises(ValueError, match="there is no"):
        torch_faces.load_network(tmp_path / "nothing.dat")
