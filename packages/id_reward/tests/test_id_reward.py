from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from id_reward import (
    CompositeReward,
    Faces,
    IdentityScorer,
    copy_paste,
    match,
    multi_id_alignment_reward,
    score_similarity,
    swap_matrix,
)
from id_reward.images import open_image

ORACLES = json.loads((Path(__file__).parent / "data" / "oracles.json").read_text())
MATRICES = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda s: arrays(np.float64, s, elements=st.floats(-1, 1, allow_subnormal=False))
)


@pytest.mark.parametrize("case", ORACLES["matching"]["cases"])
def test_matching_agrees_with_the_reference_implementations(case: dict) -> None:
    matrix = np.array(case["similarity"])
    found = match(matrix)
    assert found.pairs == tuple(zip(case["rows"], case["cols"], strict=True))
    assert found.total == pytest.approx(case["matched_sum"], abs=1e-9)
    assert score_similarity(matrix, convention="umo").reward == pytest.approx(case["umo_mimr"], abs=1e-6)
    assert score_similarity(matrix, convention="multihuman").reward == pytest.approx(
        case["matched_sum_over_references"], abs=1e-6
    )


@pytest.mark.parametrize("case", ORACLES["copy_paste"]["cases"])
def test_copy_paste_agrees(case: dict) -> None:
    got = copy_paste(*(np.array(case[k]) for k in ("generated", "target", "reference")))
    assert got == pytest.approx(case["copy_paste"], abs=1e-5)


@given(MATRICES)
@settings(deadline=None)
def test_matching_is_optimal_and_one_to_one(matrix: np.ndarray) -> None:
    found = match(matrix)
    assert len({r for r, _ in found.pairs}) == len({f for _, f in found.pairs}) == len(found.pairs) == min(matrix.shape)
    small, large = sorted(matrix.shape)
    wide = matrix if matrix.shape[0] == small else matrix.T
    best = max(sum(wide[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(large), small))
    assert found.total == pytest.approx(best, abs=1e-9)


@given(MATRICES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_reward_properties(matrix: np.ndarray, random) -> None:  # type: ignore[no-untyped-def]
    reward = score_similarity(matrix, missing_penalty=0.3, extra_penalty=0.2).reward
    faces = list(range(matrix.shape[1]))
    random.shuffle(faces)
    assert score_similarity(matrix[:, faces], missing_penalty=0.3, extra_penalty=0.2).reward == pytest.approx(
        reward, abs=1e-9
    )
    plain = score_similarity(matrix)
    assert 0 <= plain.reward <= 1
    # a stranger, unlike every reference, never helps
    stranger = np.hstack([matrix, np.full((len(matrix), 1), -0.1)])
    assert (
        score_similarity(stranger, extra_penalty=0.2).reward
        <= score_similarity(matrix, extra_penalty=0.2).reward + 1e-9
    )
    # losing a matched face never helps
    for _, face in plain.matching.pairs:
        assert score_similarity(np.delete(matrix, face, 1)).reward <= plain.reward + 1e-9
    # a better pair never hurts
    for r, f in plain.matching.pairs:
        better = matrix.copy()
        better[r, f] = min(1.0, better[r, f] + 0.1)
        assert score_similarity(better).reward >= plain.reward - 1e-9


def test_copies_of_the_mean_face_never_beat_the_right_faces() -> None:
    generator = np.random.default_rng(0)
    for count in (2, 3, 4):
        people = generator.normal(size=(count, 16))
        people /= np.linalg.norm(people, axis=1, keepdims=True)
        mean = np.repeat(people.mean(0, keepdims=True), count, 0)
        assert (
            multi_id_alignment_reward(people, mean).reward
            < multi_id_alignment_reward(people, people).reward
            == pytest.approx(1)
        )
        hack = multi_id_alignment_reward(people, mean[:1], convention="xverse").reward
        assert hack > multi_id_alignment_reward(people, mean[:1]).reward  # the not exclusive convention can be gamed


def test_a_missing_face_is_punished() -> None:
    full = multi_id_alignment_reward(np.eye(3), np.eye(3)).reward
    assert multi_id_alignment_reward(np.eye(3), np.eye(3)[:2]).reward == pytest.approx(2 / 3)
    assert multi_id_alignment_reward(np.eye(3), np.eye(3)[:2], missing_penalty=0.5).reward == pytest.approx(
        2 / 3 - 0.5 / 3
    )
    assert multi_id_alignment_reward(np.eye(3), np.zeros((0, 3))).reward == 0 < full


def test_swap_matrix_has_the_matched_similarity_on_its_diagonal() -> None:
    matrix = np.array([[0.2, 0.9], [0.8, 0.1]])
    np.testing.assert_allclose(swap_matrix(matrix), [[0.9, 0.2], [0.1, 0.8]])


@pytest.mark.parametrize(("call", "word"), [
    (lambda: match(np.zeros(3)), "similarity"),
    (lambda: match(np.array([[np.nan]])), "finite"),
    (lambda: multi_id_alignment_reward(np.eye(2), np.eye(3)), "width"),
    (lambda: multi_id_alignment_reward(np.array([[np.nan, 1]]), np.eye(2)), "finite"),
    (lambda: score_similarity(np.eye(2), convention="best"), "convention"),  # type: ignore[arg-type]
    (lambda: score_similarity(np.eye(2), missing_penalty=-1), "missing_penalty"),
    (lambda: CompositeReward({}), "parts"),
])  # fmt: skip
def test_bad_input_is_named(call, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        call()


class Finder:
    """Every picture is an array of embeddings."""

    def __init__(self) -> None:
        self.seen = 0

    def detect_and_embed(self, images: list[np.ndarray]) -> list[Faces]:
        self.seen += len(images)
        return [Faces(np.tile([0.0, 0, 1, 1], (len(i), 1)), np.ones(len(i)), i) for i in images]


def test_identity_scorer_embeds_a_reference_once_and_marks_what_it_cannot_score() -> None:
    backend, people = Finder(), [np.eye(4)[[0]], np.eye(4)[[1]]]
    scorer = IdentityScorer(backend)
    pictures = [np.eye(4)[:2], np.eye(4)[2:], np.eye(4)[:1]]
    np.testing.assert_allclose(scorer(pictures, [""] * 3, [people] * 3), [1, 0, 0.5])
    assert backend.seen == 3 + 2
    assert np.isnan(scorer(pictures[:1], [""], [[np.zeros((0, 4))]])).all()


def test_composite_weighs_normalises_and_handles_nan() -> None:
    one = lambda images, prompts, references: np.array([1.0, np.nan])  # noqa: E731
    two = lambda images, prompts, references: np.array([4.0, 6.0])  # noqa: E731
    reward = CompositeReward({"one": (one, 2.0), "two": (two, 1.0)}, normalization={"two": (4.0, 2.0)})
    score = reward([0, 0], ["", ""], [[], []])
    np.testing.assert_allclose(score.totals, [2.0, np.nan])
    np.testing.assert_allclose(score.parts["two"], [4, 6])
    assert reward.statistics(score)["one"]["nan"] == 1
    np.testing.assert_allclose(
        CompositeReward({"one": (one, 1.0)}, nan_policy="zero")([0, 0], ["", ""], [[], []]).totals, [1, 0]
    )
    with pytest.raises(ValueError, match="one"):
        CompositeReward({"one": (one, 1.0)}, nan_policy="raise")([0, 0], ["", ""], [[], []])


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs id-reward[image]")
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (6, 4, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (6, 4)
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (128, 128, 128)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[rgb])
    for name in ("cmyk.jpg", "moving.gif"):
        assert open_image(tmp_path / name).mode == "RGB"
    (tmp_path / "cut.png").write_bytes((tmp_path / "clear.png").read_bytes()[:50])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png", "missing.png", "."):
        with pytest.raises(ValueError, match="picture"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match="pixels"):
        open_image(tmp_path / "turned.jpg", max_pixels=10)


def test_fuzzed_files_never_crash(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs id-reward[image]")
    rng, path = np.random.default_rng(0), tmp_path / "x.png"
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    good = path.read_bytes()
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(0, len(data), 4):
            data[position] = rng.integers(0, 256)
        path.write_bytes(bytes(data[: rng.integers(1, len(data) + 1)]))
        with contextlib.suppress(ValueError):
            assert open_image(path).mode == "RGB"
