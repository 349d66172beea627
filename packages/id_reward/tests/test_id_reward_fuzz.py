"""Whatever is handed over: rewards, or a refusal in one sentence; never another exception, and nothing of the caller's is changed."""

from __future__ import annotations

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import array_shapes, arrays

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward import CompositeReward, Evaluator, Faces, IdentityScorer
from id_reward.errors import InputError
from id_reward.images import as_array
from id_reward.integrations.rewards import FlowGRPOReward, TRLReward, VerlOmniReward
from PIL import Image

SEEN: list[bool] = []
MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "I;16B",
    "F",
)


@st.composite
def pil(draw) -> Image.Image:  # type: ignore[no-untyped-def]
    """A picture of any mode, with any content, and with odd things said about it."""
    mode, size = draw(st.sampled_from(MODES)), draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    picture = Image.new(mode, size)
    data = draw(st.binary(min_size=len(picture.tobytes()), max_size=len(picture.tobytes())))
    picture = Image.frombytes(mode, size, data)
    if mode in ("P", "PA"):
        picture.putpalette(draw(st.binary(min_size=768, max_size=768)))
    if draw(st.booleans()):
        picture.info["transparency"] = draw(st.integers(0, 300) | st.binary(max_size=256) | st.just((1, 2, 3)))
    if draw(st.booleans()):
        picture.getexif()[0x0112] = draw(st.integers(0, 12))
    return picture


ARRAYS = st.sampled_from(["u1", "u2", "i4", "f2", "f4", "f8", "?", "U3", "c8", "i8"]).flatmap(
    lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
ODD = (
    st.none() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.binary(max_size=20) | st.just("/nowhere.png")
    | st.just({"bytes": b"x"}) | st.just({"path": None}) | st.just(object()) | st.sets(st.integers(), max_size=2)
)  # fmt: skip
PICTURES = pil() | ARRAYS | ODD


def of_objects(items):  # type: ignore[no-untyped-def]
    """A NumPy array that holds these very objects."""
    array = np.empty(len(items), object)
    for number, item in enumerate(items):
        array[number] = item
    return array


CONTAINERS = st.sampled_from([list, tuple, iter, of_objects])


def contained(items):  # type: ignore[no-untyped-def]
    return st.builds(lambda make, some: make(list(some)), CONTAINERS, items)


PLAIN = pil() | arrays("u1", st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 4])))


def batch(count: int):  # type: ignore[no-untyped-def]
    """Pictures, references and how many there are: mostly as many as there should be, and mostly pictures."""
    several = st.lists(PLAIN, min_size=count, max_size=count) | st.lists(PICTURES, max_size=3)
    rows = st.lists(contained(st.lists(PLAIN, max_size=2)), min_size=count, max_size=count) | st.lists(
        contained(st.lists(PICTURES, max_size=2)) | PICTURES, max_size=3
    )
    return st.tuples(contained(several), contained(rows) | PICTURES, st.just(count))


BATCHES = st.integers(0, 3).flatmap(batch)


class Colours:
    """One face in each picture, its mean colour; none in dark ones."""

    def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
        means = [as_array(image).reshape(-1, 3).mean(0) for image in images]
        return [
            Faces(np.zeros((int(m.sum() > 50), 4)), np.ones(int(m.sum() > 50)), m[None][: int(m.sum() > 50)])
            for m in means
        ]


def outcome(call):  # type: ignore[no-untyped-def]
    """What a call gives; a refusal is checked to be one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except InputError as error:
        message = str(error)
    assert message.strip() and "\n" not in message and len(message) < 600
    return None


@given(PICTURES)
@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
def test_any_picture_is_seen_or_refused(picture) -> None:
    before = picture.tobytes() if hasattr(picture, "tobytes") else None
    found = outcome(lambda: as_array(picture))
    assert found is None or (found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3)
    if before is not None:
        assert picture.tobytes() == before


@given(BATCHES)
@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
def test_any_batch_is_scored_or_refused(given_batch) -> None:
    images, references, count = given_batch
    scorer = IdentityScorer(Colours())
    found = outcome(lambda: scorer(images, ["x"] * count, references))
    SEEN.append(found is not None)
    assert found is None or (found.ndim == 1 and found.dtype == np.float64)


def test_both_outcomes_happened() -> None:
    """So both were tested; how often depends on hypothesis, which draws anew every time."""
    if SEEN:
        assert min(sum(SEEN), len(SEEN) - sum(SEEN)) >= 2


@pytest.mark.slow
@given(BATCHES, st.sampled_from(range(5)))
@settings(deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
def test_every_door_scores_or_refuses(given_batch, door) -> None:
    images, references, count = given_batch
    scorer, prompts = IdentityScorer(Colours()), ["x"] * count
    reward = CompositeReward({"x": (scorer, 1.0)}, batch_size=2)
    doors = (
        lambda: reward(images, prompts, references), lambda: Evaluator(identity=scorer)(images, prompts, references),
        lambda: TRLReward(reward)(prompts=prompts, completions=images, references=references),
        lambda: FlowGRPOReward(reward)(images, prompts, [{"references": references}] * count),
        lambda: VerlOmniReward(reward)("", images, "x", {"references": references}),
    )  # fmt: skip
    outcome(doors[door])
