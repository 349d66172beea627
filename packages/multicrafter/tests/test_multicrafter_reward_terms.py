"""What a blended face and a copied face cost in stage 2's reward: nothing by default, and what the terms say where they are asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from id_reward import IdentityScorer
from id_reward.copying import CopyPaste
from id_reward.protocols import Faces
from multicrafter import UserError
from multicrafter.training.rewarding import photo_reward
from multicrafter.world import WorldConfig, make_scenes
from multicrafter.world.rewards import DRAWN_FREE, PHOTO_FREE, RewardConfig, composite, tiny_reward

ALONE = RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0)


class Known:
    """Reads faces out of a picture whose rows are embeddings."""

    calls = 0

    def detect_and_embed(self, images):
        self.calls += len(images)
        boxes = [np.tile([0.0, 0, 4, 4], (len(i), 1)) for i in images]
        return [Faces(b, np.ones(len(i)), np.asarray(i, float)) for b, i in zip(boxes, images, strict=True)]


def with_terms(**terms):
    return RewardConfig(text=0.0, aesthetics=0.0, multi_id=1.0, **terms)


def test_an_average_face_pays_for_being_like_both():
    """By hand: the mean of two orthogonal people, painted twice, earns .707 matched, and is .707 like the wrong one, too."""
    references = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]
    average, right = np.full((2, 2), np.sqrt(0.5)), np.eye(2)
    columns = [average, right], ["", ""], [references, references]
    plain = composite(ALONE, Known(), text=None, aesthetics=None, free=0.8)(*columns).totals
    assert plain == pytest.approx([np.sqrt(0.5), 1.0])
    paid = composite(with_terms(off_pair_penalty=0.6), Known(), text=None, aesthetics=None, free=0.8)(*columns).totals
    assert paid == pytest.approx([np.sqrt(0.5) * (1 - 0.6), 1.0])


@pytest.fixture(scope="module")
def people():
    """Two scenes of one person each (the same), and the person's references."""
    world = WorldConfig(numbers=(1,))
    scenes = make_scenes(6, world, torch.Generator().manual_seed(2))
    return scenes


def test_a_pasted_reference_pays_and_a_person_drawn_anew_pays_less(people):
    references = [[r] for r in people.references[:, 0]]
    pasted = list(torch.nn.functional.interpolate(people.references[:, 0], (64, 64), mode="bilinear", antialias=True))
    drawn = list(people.images)
    rows = [""] * len(references)
    plain, paying = tiny_reward(ALONE), tiny_reward(with_terms(copy_paste=0.5))
    assert set(plain.parts) == {"multi_id"} and set(paying.parts) == {"multi_id", "copy_paste"}
    for pictures in (pasted, drawn):
        before, now = plain(pictures, rows, references), paying(pictures, rows, references)
        assert np.allclose(now.totals, before.totals - 0.5 * now.parts["copy_paste"]), "one term, one weight"
        assert np.allclose(now.parts["multi_id"], before.totals)
    copied = paying(pasted, rows, references).parts["copy_paste"]
    anew = paying(drawn, rows, references).parts["copy_paste"]
    assert copied.min() > 0.6 and anew.mean() < copied.mean() - 0.3


def test_faces_are_found_once_for_both_terms():
    backend = Known()
    reward = composite(with_terms(copy_paste=0.5, off_pair_penalty=0.5), backend, text=None, aesthetics=None, free=0.5)
    picture = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)

    def find(images):
        backend.calls += len(images)
        return [Faces(np.array([[0.0, 0, 8, 8]]), np.ones(1), np.array([[1.0, 0.0]])) for _ in images]

    backend.detect_and_embed = find
    reward([picture], [""], [[picture]])
    assert backend.calls <= 2, "the picture, and the reference"


def test_nothing_changes_where_nothing_is_asked(people):
    assert RewardConfig() == RewardConfig(off_pair_penalty=0.0, copy_paste=0.0, copy_paste_free=None)
    (scorer, weight) = tiny_reward(ALONE).parts["multi_id"]
    assert weight == 1.0 and isinstance(scorer, IdentityScorer) and scorer.off_pair_penalty == 0.0


def test_photos_have_the_same_terms_at_their_own_likeness(people):
    def text(images, prompts, references):
        return np.ones(len(images))

    reward = photo_reward(RewardConfig(copy_paste=1.0, off_pair_penalty=0.7), faces="tiny", text=text)
    assert set(reward.parts) == {"text", "aesthetics", "multi_id", "copy_paste"}
    (copied, weight) = reward.parts["copy_paste"]
    assert isinstance(copied, CopyPaste) and (copied.free, weight) == (PHOTO_FREE, -1.0)
    assert copied.identity.off_pair_penalty == 0.7
    assert tiny_reward(with_terms(copy_paste=1.0)).parts["copy_paste"][0].free == DRAWN_FREE
    assert (
        photo_reward(with_terms(copy_paste=1.0, copy_paste_free=0.5), faces="tiny").parts["copy_paste"][0].free == 0.5
    )
    pictures = list(people.images)
    score = reward(pictures, [""] * 6, [[r] for r in people.references[:, 0]])
    assert np.isfinite(score.totals).all()
    with pytest.raises(UserError, match=r"text must have weight 0 where there is no scorer for it, got 1\.0"):
        photo_reward(faces="tiny")
    with pytest.raises(UserError, match="faces"):
        photo_reward(ALONE, faces="nobody")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"off_pair_penalty": -1.0}, "off_pair_penalty must not be negative"),
        ({"copy_paste": -0.1}, "copy_paste must not be negative"),
        ({"copy_paste": float("nan")}, "copy_paste must be finite"),
        ({"copy_paste_free": 1.0}, "copy_paste_free must be in"),
        ({"off_pair_penalty": 0.5, "convention": "umo"}, "off_pair_penalty needs convention 'multicrafter'"),
        ({"off_pair_penalty": 0.5, "convention": "mean"}, "off_pair_penalty needs convention 'multicrafter'"),
    ],
)
def test_wrong_terms_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        RewardConfig(**wrong)
