"""Does a face repeat its reference? Pasted, moved, scaled, mirrored, tilted and shaded faces do; another picture of the face does not."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward import CompositeReward, Faces, IdentityScorer, OffPairSimilarity
from id_reward.copying import BASE, SIDE, CopyPaste, repeated_appearance, surroundings, templates
from id_reward.inputs import content_key
from id_reward.remembering import RememberingBackend
from PIL import Image, ImageFilter


def face(seed: int, size: int = 80) -> Image.Image:
    """Blobs: as much structure as a face has, and another one for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def scene(seed: int, *faces: tuple[Image.Image, int, int]) -> np.ndarray:
    """Faces at places on a background of its own."""
    canvas = face(1000 + seed, 320).filter(ImageFilter.GaussianBlur(20))
    for picture, x, y in faces:
        canvas.paste(picture, (x, y))
    return np.asarray(canvas)


class Placed:
    """A backend that has been told where the faces of a picture are, and whose."""

    def __init__(self) -> None:
        self.known: dict[object, Faces] = {}
        self.seen: list[int] = []

    def tell(self, picture: np.ndarray, *faces: tuple[int, int, int, int]) -> np.ndarray:
        """left, top, side, person."""
        boxes = np.array([[x, y, x + s, y + s] for x, y, s, _ in faces], float).reshape(-1, 4)
        self.known[content_key(picture)] = Faces(boxes, np.ones(len(faces)), np.eye(4)[[p for *_, p in faces]])
        return picture

    def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
        self.seen.append(len(images))
        return [self.known[content_key(i)] for i in images]


def likeness(
    picture: Image.Image, box: tuple[float, ...], reference: Image.Image, reference_box: tuple[float, ...]
) -> float:
    return repeated_appearance(
        surroundings(picture, np.array(box)), templates(surroundings(reference, np.array(reference_box)))
    )


WHERE = (120, 100, 200, 180)


@pytest.mark.parametrize(("change", "least"), [
    (lambda p: p, 0.999), (lambda p: p.resize((160, 160)), 0.98), (lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0.95),
    (lambda p: p.rotate(7, Image.Resampling.BILINEAR), 0.9), (lambda p: p.point(lambda v: v * 0.5 + 20), 0.98),
    (lambda p: Image.fromarray((np.asarray(p) * np.linspace(0.4, 1, p.width)[None, :, None]).astype(np.uint8)), 0.9),
    (lambda p: p.filter(ImageFilter.GaussianBlur(4)), 0.9), (lambda p: p.resize((370, 320)), 0.85),
])  # fmt: skip
def test_a_pasted_face_correlates_whatever_is_done_to_it(change, least) -> None:
    whole = Image.fromarray(scene(0, (face(1), 120, 100)))
    changed = change(whole)
    box = [v * s for v, s in zip(WHERE, (changed.width / 320, changed.height / 320) * 2)]
    if change(Image.new("L", (2, 1))).size == (2, 1) and np.array_equal(
        np.asarray(changed), np.asarray(whole)[:, ::-1]
    ):
        box = [320 - box[2], box[1], 320 - box[0], box[3]]
    assert likeness(changed, tuple(box), whole, WHERE) > least


@pytest.mark.parametrize("jitter", [(6, 0, 0), (-5, 5, 0), (0, 0, 8), (4, -4, -8)])
def test_where_exactly_the_detector_puts_its_box_does_not_matter(jitter) -> None:
    x, y, size = jitter
    picture, reference = Image.fromarray(scene(0, (face(1), 30, 150))), Image.fromarray(scene(1, (face(1), 120, 100)))
    box = (30 + x - size, 150 + y - size, 110 + x + size, 230 + y + size)
    assert likeness(picture, box, reference, WHERE) > 0.9


def test_other_faces_do_not_correlate() -> None:
    reference = Image.fromarray(scene(0, (face(0), 120, 100)))
    found = [likeness(Image.fromarray(scene(n, (face(n), 120, 100))), WHERE, reference, WHERE) for n in range(1, 25)]
    assert max(found) < 0.7 and np.mean(found) < 0.55


def test_faces_at_the_edge_and_pictures_without_structure() -> None:
    reference = templates(surroundings(Image.fromarray(scene(0, (face(1), 120, 100))), np.array(WHERE)))
    picture = scene(2, (face(1), 0, 0))
    assert surroundings(picture, np.array([0, 0, 80, 80])).shape == (BASE, BASE)
    assert repeated_appearance(surroundings(picture, np.array([0, 0, 80, 80])), reference) > 0.9
    flat = np.full((50, 50, 3), 90, np.uint8)
    for box in ([10, 10, 40, 40], [-100, -100, -50, -50], [10, 10, 10, 10], [0, 0, 500, 500]):
        assert repeated_appearance(surroundings(flat, np.array(box, float)), reference) == 0
    assert templates(np.zeros((BASE, BASE))).any() == False  # noqa: E712
    assert reference.shape == (30, SIDE * SIDE)
    np.testing.assert_allclose(np.linalg.norm(reference, axis=1), 1)


def world() -> tuple[Placed, list[np.ndarray], list[list[np.ndarray]]]:
    """Two people; pictures: both pasted, one pasted and one painted anew, both anew, nobody."""
    backend = Placed()
    references = [backend.tell(scene(10 + p, (face(p), 120, 100)), (120, 100, 80, p)) for p in (0, 1)]
    pictures = [
        scene(0, (face(0), 20, 120), (face(1), 200, 120)), scene(1, (face(0), 20, 120), (face(51), 200, 120)),
        scene(2, (face(50), 20, 120), (face(51), 200, 120)), scene(3),
    ]  # fmt: skip
    for picture in pictures[:3]:
        backend.tell(picture, (20, 120, 80, 0), (200, 120, 80, 1))
    backend.tell(pictures[3])
    return backend, pictures, [references] * 4


def test_likeness_alone_rewards_pasting_and_the_term_does_not() -> None:
    backend, pictures, references = world()
    identity = IdentityScorer(backend)
    reward = CompositeReward({"identity": (identity, 1.0), "pasted": (CopyPaste(identity), -1.0)})
    score = reward(pictures, [""] * 4, references)
    assert score.parts["identity"].tolist() == [1, 1, 1, 0]
    pasted = score.parts["pasted"]
    assert pasted[0] > 0.9 and 0.45 < pasted[1] < 0.6 and pasted[2] < 0.1 and pasted[3] == 0
    assert score.totals[2] > score.totals[1] > score.totals[0]


def test_a_reference_is_looked_at_once_and_what_cannot_be_scored_is_nan() -> None:
    backend, pictures, references = world()
    scorer = CopyPaste(IdentityScorer(backend))
    first = scorer(pictures, [""] * 4, references)
    np.testing.assert_array_equal(scorer(pictures, [""] * 4, [[r.copy() for r in references[0]]] * 4), first)
    assert backend.seen == [
        2,
        4,
        2,
        4,
    ]  # the identity's references, the pictures, this one's references, the pictures again
    with pytest.warns(UserWarning, match="no references"):
        assert np.isnan(scorer(pictures[:1], [""], [[]])).all()
    none = backend.tell(scene(30))
    with pytest.warns(UserWarning, match="must show a face"):
        assert np.isnan(scorer(pictures[:1], [""], [[none]])).all()
    for wrong in ({"free": 1.0}, {"free": float("nan")}, {"cache_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CopyPaste(scorer.identity, **wrong)


def test_free_and_the_mean_over_faces() -> None:
    backend, pictures, references = world()
    identity = IdentityScorer(backend)
    strict, lenient = CopyPaste(identity, free=0.0), CopyPaste(identity, free=0.99)
    found = strict(pictures[1:2], [""], references[:1])[0]
    left, right = (
        likeness(Image.fromarray(pictures[1]), box, Image.fromarray(references[0][p]), WHERE)
        for p, box in ((0, (20, 120, 100, 200)), (1, (200, 120, 280, 200)))
    )
    assert found == pytest.approx((left + max(right, 0)) / 2)
    assert lenient(pictures[2:3], [""], references[:1])[0] == 0


def test_several_parts_find_faces_once() -> None:
    backend, pictures, references = world()
    remembering = RememberingBackend(backend)  # type: ignore[arg-type]
    identity = IdentityScorer(remembering)
    reward = CompositeReward({
        "identity": (identity, 1.0), "pasted": (CopyPaste(identity), -1.0), "blend": (OffPairSimilarity(identity), -1.0),
    })  # fmt: skip
    reward(pictures, [""] * 4, references)
    assert backend.seen == [2, 4]
    reward([p.copy() for p in pictures], [""] * 4, references)
    assert backend.seen == [2, 4]


def test_what_is_remembered_is_bounded_and_by_content() -> None:
    backend, pictures, _ = world()
    remembering = RememberingBackend(backend, pictures=2)  # type: ignore[arg-type]
    remembering.detect_and_embed([pictures[0], pictures[0].copy(), pictures[1]])
    remembering.detect_and_embed([pictures[1], pictures[2]])
    remembering.detect_and_embed([pictures[0]])  # has gone
    assert backend.seen == [2, 1, 1]
    assert remembering.known is backend.known and copy.copy(remembering).backend is backend
    with pytest.raises(AttributeError):
        _ = remembering.nothing
    with pytest.raises(ValueError, match="pictures"):
        RememberingBackend(backend, pictures=0)  # type: ignore[arg-type]

    class Handles:
        def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
            return [Faces(np.zeros((1, 4)), np.ones(1), np.array([[float(i.value)]])) for i in images]

    class Handle:
        def __init__(self, value: int) -> None:
            self.value = value

    handles = RememberingBackend(Handles())
    for value in range(30):
        assert handles.detect_and_embed([Handle(value), Handle(value + 1)])[1].embeddings[0, 0] == value + 1


def test_two_threads_that_ask_for_the_same_pictures_find_them_once() -> None:
    backend, pictures, _ = world()
    slow, go = threading.Event(), threading.Event()
    real = backend.detect_and_embed

    def detect(images):  # type: ignore[no-untyped-def]
        slow.set()
        go.wait(10)
        return real(images)

    backend.detect_and_embed = detect  # type: ignore[method-assign]
    remembering = RememberingBackend(backend)  # type: ignore[arg-type]
    threads = [threading.Thread(target=remembering.detect_and_embed, args=(pictures,)) for _ in range(2)]
    threads[0].start()
    slow.wait(10)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join()
    assert backend.seen == [4]


def test_references_keep_their_closer_look() -> None:
    class Careful(Placed):
        def detect_and_embed_references(self, images):  # type: ignore[no-untyped-def]
            self.seen.append(-len(images))
            return [self.known[content_key(i)] for i in images]

    backend = Careful()
    picture = backend.tell(scene(0, (face(0), 120, 100)), (120, 100, 80, 0))
    remembering = RememberingBackend(backend)  # type: ignore[arg-type]
    scorer = IdentityScorer(remembering)
    assert scorer([picture], [""], [[picture]]).tolist() == [1]
    assert backend.seen == [-1, 1]
    assert not hasattr(RememberingBackend(Placed()), "detect_and_embed_references")  # type: ignore[arg-type]
