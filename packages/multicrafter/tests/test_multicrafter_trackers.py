"""Trackers get what training measures, and never cost the run."""

from __future__ import annotations

import sys
import types

import multicrafter_workers as workers
import pytest
import torch
from multicrafter.training import loop
from multicrafter.training.loop import LoopConfig
from multicrafter.training.trackers import NoTracker, TensorBoardTracker, make_tracker


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("number", [1, 2])
def test_tensorboard_shows_losses_reward_parts_routing_and_attention(number, tmp_path):
    pytest.importorskip("tensorboard")
    stage = workers.make_stage(number)
    tracker = make_tracker("tensorboard", tmp_path)
    history = loop.run(stage, num_steps=4, out=tmp_path, tracker=tracker, loop=LoopConfig(picture_every=2))
    found = events(tmp_path / "tensorboard")
    names = found.Tags()["scalars"]
    wanted = (
        {"loss", "attention_loss", "grad_norm"}
        if number == 1
        else {"reward", "reward_brightness", "clip_fraction", "window"}
    )
    assert wanted <= set(names)
    first = "loss" if number == 1 else "reward"
    assert [e.value for e in found.Scalars(first)] == pytest.approx([m[first] for m in history])
    loads = [n for n in names if n.startswith("routing/") and "/load_" in n]
    assert sum(found.Scalars(n)[0].value for n in loads if "transformer_blocks.0.ff/" in n) == pytest.approx(1.0)
    pictures = set(found.Tags()["images"])
    assert {"attention", "routing"} | ({"group"} if number == 2 else set()) <= pictures
    shown = found.Images("attention")[0]
    assert shown.width == 5 * 64 + 4 * 2 and shown.height == 3 * 64  # target, two references, two maps; three scenes


def test_looking_changes_nothing(tmp_path):
    stages = [workers.make_stage(1) for _ in range(2)]
    loop.run(stages[0], num_steps=3, out=tmp_path / "a")
    loop.run(
        stages[1],
        num_steps=3,
        out=tmp_path / "b",
        tracker=make_tracker("tensorboard", tmp_path),
        loop=LoopConfig(picture_every=1),
    )
    for (name, a), (_, b) in zip(*(s.adapters.named_parameters() for s in stages), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_hosted_trackers_get_the_same(kind, tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType(kind)
    fake.init = lambda **options: calls.append(("init", options))
    fake.log = lambda values, step: calls.append(("log", step, values))
    fake.Image = lambda array: ("image", array.shape, str(array.dtype))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, kind, fake)
    with make_tracker(kind, tmp_path / "runs" / "one", config={"lr": 1}) as tracker:
        tracker.metrics(1, {"step": 1, "loss": 0.5, "reward": float("nan")})
        tracker.pictures(1, {"attention": torch.rand(3, 4, 6)})
    assert calls[0][1]["name"] == "runs-one" and calls[0][1]["resume"] == "allow" and calls[0][1]["config"] == {"lr": 1}
    assert calls[1] == ("log", 1, {"loss": 0.5})
    assert calls[2] == ("log", 1, {"attention": ("image", (4, 6, 3), "uint8")})
    assert calls[3] == ("finish",)


def test_a_tracker_that_fails_is_said_once_and_costs_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tracker = TensorBoardTracker(tmp_path / "file" / "events")
    stage = workers.make_stage(1)
    history = loop.run(stage, num_steps=3, out=tmp_path / "run", tracker=tracker)
    assert len(history) == 3
    assert caplog.text.count("TensorBoardTracker failed") == 1


def test_unknown_and_missing_trackers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tracker must be one of"):
        make_tracker("paper", tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        make_tracker("wandb", tmp_path)
    assert isinstance(make_tracker("none", tmp_path), NoTracker)
