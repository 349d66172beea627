"""What goes wrong in long runs: full disks, damaged files, NaN, signals, rewards that raise; each costs as little as it can."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import multicrafter_workers as workers
import numpy as np
import pytest
import torch
from multicrafter.training import checkpoint, loop
from multicrafter.training.checkpoint import Checkpoint, CheckpointError, find_checkpoint, rng_tensors, save_checkpoint
from multicrafter.training.loop import LoopConfig
from multicrafter.training.rewarding import score_pictures
from safetensors import SafetensorError


class Counter:
    """A stage that adds random numbers of every generator up; what it does at a step can be changed."""

    def __init__(self, at=None, losses=None):
        self.total, self.at, self.losses = torch.zeros(1, dtype=torch.float64), at or {}, losses or {}

    def step(self, index):
        self.total += torch.rand(1).double() + np.random.rand() + random.random()
        self.at.get(index, lambda: None)()
        loss = self.losses.get(index, float(10 - index))
        return {"loss": loss, "skipped": float(loss != loss)}

    def tensors(self):
        return {"total": self.total.clone()}

    def restore(self, tensors):
        self.total = tensors["total"]


def reseed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def steps_in(folder):
    return sorted(int(p.name[5:]) for p in folder.glob("step_*"))


def test_every_generator_goes_on_where_it_was(tmp_path):
    reseed()
    straight = Counter()
    loop.run(straight, num_steps=6, out=tmp_path / "a")
    reseed()
    loop.run(Counter(), num_steps=3, out=tmp_path / "b")
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    resumed = Counter()
    loop.run(resumed, num_steps=6, out=tmp_path / "b", resume="auto")
    assert torch.equal(straight.total, resumed.total)


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    stage = Counter(losses={i: 1.0 if i == 2 else 5.0 for i in range(8)})
    loop.run(stage, num_steps=8, out=tmp_path, loop=LoopConfig(save_every=1, keep=2, best="loss"))
    assert steps_in(tmp_path / "checkpoints") == [3, 7, 8]
    highest = Counter(losses={i: 9.0 if i == 4 else 5.0 for i in range(8)})
    settings = LoopConfig(save_every=1, keep=1, best="loss", best_is="highest")
    loop.run(highest, num_steps=8, out=tmp_path, loop=settings)
    assert steps_in(tmp_path / "checkpoints") == [5, 8]


def test_a_forgotten_resume_costs_no_checkpoint(tmp_path):
    loop.run(Counter(), num_steps=3, out=tmp_path)
    loop.run(Counter(), num_steps=1, out=tmp_path)
    assert steps_in(tmp_path / "checkpoints") == [1]
    assert steps_in(tmp_path / "checkpoints.previous") == [3]


def test_resuming_from_a_named_checkpoint(tmp_path):
    loop.run(Counter(), num_steps=4, out=tmp_path, save_every=2)
    reached = []
    stage = Counter(at={i: lambda i=i: reached.append(i) for i in range(6)})
    loop.run(stage, num_steps=5, out=tmp_path, resume=tmp_path / "checkpoints" / "step_000002")
    assert reached == [2, 3, 4]
    with pytest.raises(CheckpointError, match="cannot be read"):
        loop.run(Counter(), num_steps=5, out=tmp_path, resume=tmp_path / "nowhere")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit": lambda folder: flip(folder / "state.safetensors"),
    "half a file": lambda folder: os.truncate(folder / "state.safetensors", 20),
    "no manifest": lambda folder: (folder / "state.json").unlink(),
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
    "torn manifest": lambda folder: os.truncate(folder / "state.json", 30),
    "manifest of something else": lambda folder: (folder / "state.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(damage, tmp_path, caplog):
    reseed()
    loop.run(Counter(), num_steps=4, out=tmp_path, save_every=2)
    straight = Counter()
    reseed()
    loop.run(straight, num_steps=6, out=tmp_path / "straight", save_every=2)
    DAMAGE[damage](tmp_path / "checkpoints" / "step_000004")
    again = Counter()
    loop.run(again, num_steps=6, out=tmp_path, resume="auto", save_every=2)
    assert "step_000004" in caplog.text and "falling back" in caplog.text
    assert torch.equal(again.total, straight.total)
    assert Checkpoint.open(tmp_path / "checkpoints" / "step_000004").step == 4  # written anew in its place


def test_nothing_readable_is_said_and_not_trained_over(tmp_path):
    loop.run(Counter(), num_steps=2, out=tmp_path)
    flip(tmp_path / "checkpoints" / "step_000002" / "state.safetensors")
    with pytest.raises(CheckpointError, match="all of them are damaged"):
        loop.run(Counter(), num_steps=4, out=tmp_path, resume="auto")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_costs_a_checkpoint_not_the_run(error, tmp_path, monkeypatch, caplog):
    real, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise error
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    loop.run(Counter(), num_steps=6, out=tmp_path, save_every=2)
    assert steps_in(tmp_path / "checkpoints") == [2, 6]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert "No space left" in caplog.text


def limited(out):
    """A real refusal of the operating system: files of this process may not grow beyond 20 kB."""
    import resource

    class Big(Counter):
        def tensors(self):
            return {**super().tensors(), "big": torch.zeros(20_000 if self.total > 6 else 10)}

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    loop.run(Big(), num_steps=200, out=Path(out), save_every=1)


def test_a_disk_that_stays_full_stops_the_run_with_the_last_good_checkpoint(tmp_path):
    (raised,) = workers.run(limited, str(tmp_path / "run"), tmp=tmp_path, expect=1)
    assert "CheckpointError" in raised and "cannot be written" in raised
    found = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None and found.tensors()["total"] <= 6
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(number, tmp_path):
    reseed()
    straight = Counter()
    loop.run(straight, num_steps=6, out=tmp_path / "straight")
    reseed()
    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match="--resume"):
        loop.run(Counter(at={2: lambda: os.kill(os.getpid(), number)}), num_steps=6, out=tmp_path / "stopped")
    assert signal.getsignal(number) == before
    again = Counter()
    history = loop.run(again, num_steps=6, out=tmp_path / "stopped", resume="auto")
    assert torch.equal(again.total, straight.total)
    assert [m["step"] for m in history] == [1, 2, 3, 4, 5, 6]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop.run(Counter(at={1: twice}), num_steps=6, out=tmp_path)


def test_a_torn_line_of_metrics_does_not_hinder_resuming(tmp_path):
    loop.run(Counter(), num_steps=3, out=tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    history = loop.run(Counter(), num_steps=5, out=tmp_path, resume="auto")
    assert [m["step"] for m in history] == [1, 2, 3, 4, 5]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_nan_for_long_stops_the_run_and_says_where_to_go_back_to(tmp_path):
    losses = {i: float("nan") for i in (1, 2, 5, 6, 7, 8)}
    with pytest.raises(loop.Diverged, match=r"last 3 steps.*step 8.*of step 6"):
        loop.run(Counter(losses=losses), num_steps=20, out=tmp_path, loop=LoopConfig(save_every=3, max_skipped=3))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_nan_step_changes_nothing_and_is_counted(stage):
    made = workers.make_stage(stage)
    made.step(0)
    before = {k: v.clone() for k, v in made.tensors().items()}
    proj_out = made.adapters.transformer.proj_out
    kept = proj_out.bias.data.clone()
    proj_out.bias.data[0] = torch.nan
    metrics = made.step(1)
    proj_out.bias.data.copy_(kept)
    assert metrics["skipped"] == 1
    after = made.tensors()
    changed = [
        k for k in before if k.startswith(("adapters.", "ema.", "optimizer.")) and not torch.equal(before[k], after[k])
    ]
    assert not changed
    assert made.step(2)["skipped"] == 0


class Moody:
    """Raises while ``patience`` lasts, and always on pictures darker than ``threshold``."""

    def __init__(self, patience=0, threshold=-1.0):
        self.patience, self.threshold, self.calls = patience, threshold, 0

    def __call__(self, images, prompts, references):
        self.calls += 1
        if self.patience:
            self.patience -= 1
            raise ConnectionError("the judge is away")
        values = np.array([float(i.mean()) for i in images])
        if (values < self.threshold).any():
            raise RuntimeError("too dark to judge")
        return type("Score", (), {"totals": values, "parts": {"brightness": values}})()


PICTURES = [torch.full((3, 4, 4), v) for v in (0.1, 0.5, 0.9)]
NO_REFERENCES: list = [[], [], []]


def test_the_old_name_of_a_robust_reward_works_and_says_so():
    with pytest.warns(DeprecationWarning, match=r"score_pictures is now gspo.RobustReward"):
        score = score_pictures(Moody(threshold=0.3), PICTURES, ["", "", ""], NO_REFERENCES, retries=1, wait_s=0.0)
    assert score.failed == 1 and "too dark" in score.error
    assert np.isnan(score.totals[0]) and np.allclose(score.totals[1:], [0.5, 0.9])
    assert np.isnan(score.parts["brightness"][0])


def test_stage_2_leaves_out_what_could_not_be_scored_and_stops_when_nothing_can(tmp_path):
    made = workers.make_stage(2, num_steps=20)
    made.step(0)
    # with the decoder's noise the pictures differ little: the threshold in the middle marks some of them
    threshold = float(made.last_pictures.mean((1, 2, 3)).median())
    made.reward.score = Moody(threshold=threshold)
    metrics = made.step(1)
    assert metrics["reward_failures"] >= 1 and np.isfinite(metrics["reward"])
    made.reward.score = Moody(threshold=2.0)
    with pytest.raises(loop.Diverged, match="2 steps"):
        loop.run(made, num_steps=20, out=tmp_path, loop=LoopConfig(max_skipped=2))


def test_checkpoints_say_what_they_are_of(tmp_path):
    made = workers.make_stage(2)
    made.step(0)
    save_checkpoint(tmp_path, 1, {**made.tensors(), **rng_tensors()}, notes=made.notes())
    manifest = find_checkpoint(tmp_path).manifest
    assert manifest["notes"]["adapters"]["num_experts"] == 2 and manifest["notes"]["adapters"]["gating"]
    assert manifest["notes"]["window"]["size"] == 2 and manifest["notes"]["samples_seen"] == 16
    assert manifest["code"]["multicrafter"]
    names = set(find_checkpoint(tmp_path).tensors())
    assert {"generator", "rank.rng.torch", "rank.rng.numpy.keys", "rank.rng.random.state"} <= names
    for prefix in ("adapters.", "ema.", "optimizer.", "trainer."):
        assert any(n.startswith(prefix) for n in names), prefix


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"adapters": {"num_experts": 4}}, "num_experts"),
        ({"window": {"size": 3}}, "window"),
        ({"stage": 1}, "stage"),
        ({"execution": {"ema_decay": 0.0}}, "ema_decay"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change, named):
    made = workers.make_stage(2)
    with pytest.raises(ValueError, match=named):
        made.check_notes({**made.notes(), **change})


def test_wrong_loop_settings_are_refused():
    for wrong in ({"save_every": 0}, {"keep": 0}, {"best_is": "x"}, {"picture_every": -1}):
        with pytest.raises(ValueError, match="must"):
            LoopConfig(**wrong)
