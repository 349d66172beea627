"""Objects on randomly initialised checkpoints in the real format."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
pytest.importorskip("transformers", reason="needs id-reward[clip] or id-reward[objects]")
from id_reward import FaceBackend, IdentityScorer
from id_reward.backends.objects import DinoEmbedder, ObjectBackend, cut_out, tidy

spec = importlib.util.spec_from_file_location("tiny_checkpoints", Path(__file__).with_name("tiny_checkpoints.py"))
assert spec and spec.loader
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: getattr(tiny, name)(root / name) for name in ("florence", "sam", "dino")}


@pytest.fixture(scope="module")
def backend(folders) -> ObjectBackend:
    found = ObjectBackend.from_pretrained(folders["florence"], folders["dino"], folders["sam"])
    found.locator.max_new_tokens = 12
    return found


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (size, 2 * size, 3), dtype=np.uint8) for size in (40, 64, 50)]


ANSWERS = [
    "</s><s>cat<loc_0><loc_0><loc_499><loc_999>dog<loc_500><loc_0><loc_999><loc_999></s>",
    "</s><s></s>",
    "</s><s>cup<loc_100><loc_100><loc_600><loc_900></s>",
]


@pytest.fixture
def seeing(backend, monkeypatch) -> ObjectBackend:
    """The backend, with Florence-2's words put into its mouth (its random weights say nothing sensible)."""
    monkeypatch.setattr(backend.locator, "generate", lambda images, queries: ANSWERS[: len(images)])
    return backend


def test_random_weights_run_through_and_find_nothing_sensible(backend, pictures) -> None:
    assert isinstance(backend, FaceBackend)
    for faces in backend.detect_and_embed(pictures[:2]):
        assert faces.boxes.shape[1] == 4 and faces.embeddings.shape == (len(faces.boxes), 32)
    assert backend.detect_and_embed([]) == []


def test_answers_become_boxes_masks_and_embeddings(seeing, pictures) -> None:
    two, none, one = seeing.detect_and_embed(pictures)
    np.testing.assert_allclose(two.boxes, [[0, 0, 40, 40], [40, 0, 80, 40]], atol=1)
    np.testing.assert_allclose(one.boxes, [[10, 5, 60, 45]], atol=1)
    assert none.boxes.shape == (0, 4) and none.embeddings.shape == (0, 32)
    np.testing.assert_allclose(np.linalg.norm(two.embeddings, axis=1), 1)


def test_a_batch_equals_one_by_one(seeing, pictures, monkeypatch) -> None:
    together = seeing.detect_and_embed(pictures)
    for row, picture in enumerate(pictures):
        monkeypatch.setattr(seeing.locator, "generate", lambda images, queries, row=row: [ANSWERS[row]])
        (alone,) = seeing.detect_and_embed([picture])
        np.testing.assert_allclose(alone.embeddings, together[row].embeddings, atol=1e-5)
        np.testing.assert_allclose(alone.boxes, together[row].boxes)


def test_sam_masks_a_batch_as_it_masks_one(backend, pictures) -> None:
    boxes = [np.array([[2.0, 2, 30, 30]]), np.zeros((0, 4)), np.array([[5.0, 5, 60, 40]])]
    together = backend.masker.masks(pictures, boxes)
    assert [m.shape for m in together] == [(1, 40, 80), (0, 64, 128), (1, 50, 100)]
    (alone,) = backend.masker.masks(pictures[2:], boxes[2:])
    assert (alone != together[2]).mean() < 0.001


def test_the_mask_decides_what_is_seen(seeing, pictures) -> None:
    """Outside of a mask nothing matters; inside everything does."""
    box, mask = np.array([10.0, 5, 60, 45]), np.zeros((50, 100), bool)
    mask[10:30, 20:40] = True
    background = seeing.embedder.background
    outside, inside = pictures[2].copy(), pictures[2].copy()
    outside[~mask], inside[15:20, 25:30] = 0, 0
    same = cut_out(pictures[2], box, mask, background)
    np.testing.assert_array_equal(same, cut_out(outside, box, mask, background))
    assert (same != cut_out(inside, box, mask, background)).any()
    assert same.shape == (50, 50, 3) and (same[0] == background).all()  # padded to a square, not stretched
    np.testing.assert_array_equal(
        cut_out(pictures[2], box, np.zeros_like(mask), background), cut_out(pictures[2], box, None, background)
    )


def test_phrases_ask_one_question_each(backend, pictures, monkeypatch) -> None:
    asked: list[str] = []

    def answer(images, queries):  # type: ignore[no-untyped-def]
        asked.extend(queries)
        return ["x<loc_0><loc_0><loc_400><loc_900>", "y<loc_500><loc_0><loc_999><loc_900>", "</s>"]

    monkeypatch.setattr(backend.locator, "generate", answer)
    first, second, third = backend.detect_and_embed(pictures, [["a red cup", "a dog"], ["a cat"], []])
    assert asked == [f"<OPEN_VOCABULARY_DETECTION>{p}" for p in ("a red cup", "a dog", "a cat")]
    assert [len(f.boxes) for f in (first, second, third)] == [2, 0, 0]
    with pytest.raises(ValueError, match="phrases"):
        backend.detect_and_embed(pictures, [["a"]])


def test_boxes_without_area_and_repeats_are_dropped() -> None:
    boxes = np.array([[0, 0, 50, 50], [1, 1, 50, 50], [10, 10, 10, 30], [60, 60, 61, 61], [60, 0, 90, 40.0]])
    assert tidy(boxes, 100, 100, min_share=0.002, max_overlap=0.8) == [0, 4]
    assert tidy(boxes, 100, 100, min_share=0.0, max_overlap=1.0) == [0, 1, 3, 4]


def test_the_embedding_is_the_class_token(folders, pictures) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModel

    model, processor = AutoModel.from_pretrained(folders["dino"]), AutoImageProcessor.from_pretrained(folders["dino"])
    with torch.inference_mode():
        token = model(**processor(images=pictures[:1], return_tensors="pt")).pooler_output[0]
    embedder = DinoEmbedder.from_pretrained(folders["dino"], batch_size=2)
    found = embedder.embed(pictures)
    np.testing.assert_allclose(found[0], token / token.norm(), atol=1e-5)
    np.testing.assert_allclose(found[2], embedder.embed(pictures[2:])[0], atol=1e-5)


def test_the_reward_on_objects_takes_whole_references(seeing, pictures, monkeypatch) -> None:
    first, second = seeing.detect_and_embed(pictures[:1])[0].embeddings
    scorer = IdentityScorer(seeing, no_face="whole")
    monkeypatch.setattr(seeing.locator, "generate", lambda images, queries: ["</s>"] * len(images))
    (row,) = scorer.embed_references([pictures[1]])
    np.testing.assert_allclose(row, seeing.embed_whole([pictures[1]])[0])
    monkeypatch.setattr(seeing.locator, "generate", lambda images, queries: ANSWERS[:1])
    (score,) = scorer.score([pictures[0]], [[pictures[1]]])  # the reference comes from the cache
    assert score is not None and score.reward == pytest.approx(max(first @ row, second @ row, 0), abs=1e-5)
    with pytest.raises(ValueError, match="embed_whole"):
        IdentityScorer(SimpleNamespace(detect_and_embed=list), no_face="whole")
    with pytest.raises(ValueError, match="backend must be an object with detect_and_embed"):
        IdentityScorer(seeing.locator)


def test_folders_that_are_missing_or_wrong_are_named(folders, tmp_path) -> None:
    with pytest.raises(ValueError, match="sam must be a folder"):
        ObjectBackend.from_pretrained(folders["florence"], folders["dino"], tmp_path / "nothing")
    with pytest.raises(ValueError, match="dino must be in transformers' format") as caught:
        DinoEmbedder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="max_overlap"):
        ObjectBackend(None, None, max_overlap=0.0)  # type: ignore[arg-type]
