"""Checkpoints of one run, of the one before it, and of a branch that was given up: none is taken for another, none is deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from multicrafter.training import loop
from multicrafter.training.checkpoint import checkpoints_in, find_checkpoint, rotate, save_checkpoint
from multicrafter.training.loop import LoopConfig
from multicrafter.training.run_folder import check_free

SAFE = LoopConfig(save_every=1, keep=2, best=None)


class Counter:
    """Adds ``by`` at every step."""

    def __init__(self, by=1.0):
        self.total, self.by, self.steps = torch.zeros(1), by, 0

    def step(self, index):
        self.total, self.steps = self.total + self.by, self.steps + 1
        return {"loss": 1.0}

    def tensors(self):
        return {"total": self.total.clone()}

    def restore(self, tensors):
        self.total = tensors["total"]


def steps(folder):
    return [int(p.name[5:]) for p in checkpoints_in(folder)]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, {"x": torch.ones(1)}, keep=2)
    assert steps(tmp_path) == [1_000_000, 1_000_001]
    assert find_checkpoint(tmp_path).step == 1_000_001
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_2000000").touch()
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [1_000_001]
    assert (tmp_path / "step_notes").exists()


def test_an_older_checkpoint_becomes_the_run(tmp_path):
    loop.run(Counter(), num_steps=6, out=tmp_path, loop=LoopConfig(save_every=2, keep=9))
    chosen = tmp_path / "checkpoints" / "step_000002"
    loop.run(Counter(by=100.0), num_steps=3, out=tmp_path, loop=SAFE, resume=chosen)
    assert find_checkpoint(tmp_path / "checkpoints").tensors()["total"].item() == 102
    again = Counter(by=100.0)
    loop.run(again, num_steps=4, out=tmp_path, loop=SAFE, resume="auto")
    assert (again.total.item(), again.steps) == (202, 1)
    assert steps(tmp_path / "checkpoints.abandoned") == [4, 6]


def test_a_checkpoint_of_another_folder_becomes_the_run(tmp_path):
    loop.run(Counter(), num_steps=6, out=tmp_path / "a", loop=SAFE)
    loop.run(Counter(by=10.0), num_steps=2, out=tmp_path / "b", loop=SAFE)
    theirs = tmp_path / "b" / "checkpoints" / "step_000002"
    loop.run(Counter(by=10.0), num_steps=3, out=tmp_path / "a", loop=SAFE, resume=theirs)
    assert find_checkpoint(tmp_path / "a" / "checkpoints").tensors()["total"].item() == 30
    assert steps(tmp_path / "a" / "checkpoints.abandoned") == [5, 6]
    assert steps(tmp_path / "b" / "checkpoints") == [1, 2]


def test_a_resume_forgotten_again_and_again_deletes_nothing(tmp_path):
    for count in (4, 3, 2):
        loop.run(Counter(), num_steps=count, out=tmp_path, loop=LoopConfig(save_every=9), config={"count": count})
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter.json").write_text(str(count))
    for name, count in (("checkpoints.previous", 4), ("checkpoints.previous-2", 3)):
        folder = tmp_path / name
        assert steps(folder) == [count]
        assert json.loads((folder / "config.json").read_text()) == {"count": count}
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == count
        assert (folder / "adapter" / "adapter.json").read_text() == str(count)
    assert steps(tmp_path / "checkpoints") == [2]


def test_two_runs_do_not_share_a_folder(tmp_path):
    class Second(Counter):
        def step(self, index):
            before = files(tmp_path)
            with pytest.raises(ValueError, match=f"no other run is writing to, but .* held by process {os.getpid()}"):
                loop.run(Counter(), num_steps=1, out=tmp_path)
            with pytest.raises(ValueError, match="held by process"):
                check_free(tmp_path)
            assert files(tmp_path) == before
            return super().step(index)

    loop.run(Second(), num_steps=2, out=tmp_path, loop=SAFE)
    check_free(tmp_path)
    loop.run(Counter(), num_steps=3, out=tmp_path, loop=SAFE, resume=True)


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    code = "import fcntl, os, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); f.write('x'); f.flush(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], check=False)
    loop.run(Counter(), num_steps=1, out=tmp_path)


def test_a_finished_number_of_steps_is_restored_and_nothing_is_written(tmp_path):
    loop.run(Counter(), num_steps=4, out=tmp_path, loop=LoopConfig(save_every=2, keep=9), config={"num_steps": 4})
    before = files(tmp_path)
    stage = Counter()
    history = loop.run(
        stage, num_steps=2, out=tmp_path, resume=tmp_path / "checkpoints" / "step_000002", config={"num_steps": 2}
    )
    assert (stage.total.item(), stage.steps, len(history)) == (2, 0, 2)
    assert files(tmp_path) == before


def test_the_adapter_of_an_interrupted_run_as_the_guide_says(pipe, scenes, tmp_path: Path):
    """Resume with as many steps as the checkpoint has; afterwards the run goes on as if nothing had been."""
    from copy import deepcopy
    from dataclasses import replace

    from multicrafter.models.adapters import AdapterConfig
    from multicrafter.training.pretrain import PretrainConfig
    from multicrafter.training.runs import run_pretrain
    from safetensors.torch import load_file

    config = PretrainConfig(num_steps=3, batch=2, adapters=AdapterConfig(rank=2, alpha=2.0, num_experts=2))

    class Stop(Exception):
        pass

    class Bored:
        """A tracker that stops the run after the second step."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def metrics(self, step, values):
            if step == 3:
                raise Stop

        def pictures(self, step, pictures):
            pass

    out = tmp_path / "run"
    options = {"scenes": scenes, "settings": LoopConfig(save_every=1, keep=9)}
    with pytest.raises(Stop):
        run_pretrain(deepcopy(pipe), config, out, tracker=Bored(), **options)
    assert not (out / "adapter").exists()
    before = files(out)
    with pytest.raises(ValueError, match="num_steps changed"):
        run_pretrain(deepcopy(pipe), replace(config, num_steps=9), out, resume="auto", **options)
    adapters = run_pretrain(pipe, replace(config, num_steps=2), out, resume="auto", **options)
    saved = load_file(out / "adapter" / "adapter.safetensors")
    want = load_file(out / "checkpoints" / "step_000002" / "state.safetensors")
    assert saved.keys() == adapters.names
    assert all(torch.equal(saved[k], want[f"adapters.{k}"]) for k in saved)
    assert json.loads((out / "adapter" / "adapter.json").read_text())["steps"] == 2
    assert {k: v for k, v in files(out).items() if not k.startswith("adapter/")} == before
