"""A judge that is not trained on: when it parts from the reward, a run warns or ends, and goes on otherwise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from id_reward import IdentityScorer
from multicrafter import UserError
from multicrafter.scoring.watcher import drawn_watcher
from multicrafter.training import loop
from multicrafter.training.watching import RewardGamed, Watch, WatchConfig, parted, rise
from multicrafter.world import PEOPLE, WorldConfig, judges, make_scenes
from multicrafter.world.judges.reader import Reader, ReaderBackend


def ramp(slope: float, *, noise: float = 0.1, count: int = 40, seed: int = 0) -> list[float]:
    values = slope * np.linspace(0, 1, count) + noise * np.random.default_rng(seed).standard_normal(count)
    return [float(v) for v in values]


def test_a_rise_is_counted_in_standard_errors() -> None:
    first, last = [0.0, 1.0, 2.0], [4.0, 6.0, 5.0]
    assert rise([*first, 100.0, *last], 3) == pytest.approx(4 / np.sqrt((1 + 1) / 3))
    assert rise([*first, float("nan"), *last], 3) == pytest.approx(4 / np.sqrt(2 / 3)), "what is missing is left out"
    assert rise(first, 3) == 0 and rise([1.0] * 6, 3) == 0 and rise([1.0] * 3 + [2.0] * 3, 3) == np.inf


@pytest.mark.parametrize(
    ("reward", "watched", "expected"), [(1, -1, True), (1, 1, False), (-1, -1, False), (1, 0, False)]
)
def test_judges_part_where_one_rises_and_the_other_falls(reward, watched, expected) -> None:
    assert parted(ramp(reward), ramp(watched, seed=1), WatchConfig()) is expected


def test_warns_once_or_ends() -> None:
    for action in ("warn", "stop"):
        watch = Watch(WatchConfig(action=action))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for reward, watched in zip(ramp(1), ramp(-1, seed=1), strict=True):
                watch.observe(reward, watched)
        gamed = [w for w in said if issubclass(w.category, RewardGamed)]
        assert len(gamed) == (action == "warn")
        assert (watch.finished() is None) == (action == "warn")
    assert "standard errors" in (watch.finished() or "")
    again = Watch(WatchConfig(action="stop"))
    again.restore(watch.tensors())
    assert again.finished() == watch.finished()
    again.restore({})
    assert again.finished() is None, "a checkpoint of before there was a watch"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"action": "x"}, "action"),
        ({"window": 1}, "window"),
        ({"pictures": 0}, "pictures"),
        ({"deviations": -1.0}, "deviations"),
    ],
)
def test_refusals(options, word) -> None:
    with pytest.raises(UserError, match=f"{word} must"):
        WatchConfig(**options)


def test_the_loop_ends_where_a_stage_is_finished(tmp_path, caplog) -> None:
    class Stage:
        def __init__(self) -> None:
            self.done = 0

        def step(self, index: int) -> dict[str, float]:
            self.done = index + 1
            return {"loss": 1.0}

        def finished(self) -> str | None:
            return "enough" if self.done == 3 else None

        def tensors(self) -> dict[str, torch.Tensor]:
            return {"done": torch.tensor(self.done)}

        def restore(self, tensors) -> None:  # type: ignore[no-untyped-def]
            self.done = int(tensors["done"])

    history = loop.run(Stage(), num_steps=10, out=tmp_path, save_every=100)
    assert len(history) == 3 and "ending at step 3 of 10: enough" in caplog.text
    found = loop.load_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found[0] == 3, "and is saved"


def test_the_watching_judge_knows_people_and_is_not_the_reward_s() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = make_scenes(24, WorldConfig(split="validation", numbers=(2,), shared_attributes=4), generator)
    references = [list(r) for r in scenes.references]
    strangers = [references[(i + 1) % 24] for i in range(24)]
    watcher = drawn_watcher()
    own = watcher(list(scenes.images), scenes.captions(), references)
    others = watcher(list(scenes.images), scenes.captions(), strangers)
    assert isinstance(watcher, IdentityScorer) and isinstance(watcher.backend, ReaderBackend)
    assert own.mean() > others.mean() + 0.2 and (own > others).mean() > 0.9
    faces = ReaderBackend(Reader.from_pretrained(judges.shipped())).detect_and_embed(scenes.images[:2])
    for found in faces:
        assert found.embeddings.shape == (len(found.boxes), sum(PEOPLE.sizes))
        np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)
