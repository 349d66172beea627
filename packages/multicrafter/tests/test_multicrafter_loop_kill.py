"""Training that is killed, again and again, inside the writing of checkpoints too: the adapter at the end is the same, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import multicrafter_workers as workers
import pytest
import torch
from safetensors.torch import load_file


def final(folder):
    """Adapter and moving average; gradients are those of the last step, of which a run that had nothing left to do has none."""
    return {k: v for k, v in load_file(folder / "final.safetensors").items() if not k.startswith("grad")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def killed(processes):
    return all(p.exitcode == -signal.SIGKILL for p in processes)


def train_with_kills(stage, out, tmp, *, steps, count):
    """Runs to the end through ``count`` kills: faults that the worker does to itself, or seconds after which the test kills it."""
    generator = random.Random(stage)
    for number in range(count):
        kill = moment(generator, done=newest(out), steps=steps)
        fault = None if isinstance(kill, float) else kill
        processes, errors = workers.start(
            workers.train, stage, out, num_steps=steps, resume="auto", save_every=2, fault=fault, tmp=tmp
        )
        if fault is None:
            while processes[0].is_alive() and not list(out.glob("checkpoints/step_*")) and number == 0:
                time.sleep(0.05)
            processes[0].join(kill)
            processes[0].kill()
        processes[0].join(580)
        if processes[0].exitcode == 0:  # it was through before it was killed
            (out / "final.safetensors").unlink()
        else:
            assert killed(processes), Path(f"{errors}.0").read_text()
    workers.run(workers.train, stage, out, num_steps=steps, resume="auto", save_every=2, tmp=tmp)


def newest(out):
    """Step of the newest checkpoint, whole or not."""
    return max((int(p.name.removeprefix("step_")) for p in out.glob("checkpoints/step_*")), default=0)


def moment(generator, *, done, steps):
    """A random moment ahead: in a training step, at one of the calls by which checkpoints are written, or after some seconds."""
    kinds = [
        lambda: ("write", generator.randint(1, 15)),
        lambda: ("step", min(done + generator.randint(0, 5), steps - 1)),
        lambda: generator.uniform(0.0, 4.0),
    ]
    return generator.choice(kinds)()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_training_ends_where_untouched_training_ends(stage, count, tmp_path):
    steps = 3 * count + 2  # so that there is something left to kill
    workers.run(workers.train, stage, tmp_path / "straight", num_steps=steps, save_every=2, tmp=tmp_path)
    out = tmp_path / "killed"
    out.mkdir()
    train_with_kills(stage, out, tmp_path, steps=steps, count=count)
    assert same(final(tmp_path / "straight"), final(out))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    assert not list((out / "checkpoints").glob(".*")), "left-overs of killed writes must be gone"


@pytest.mark.parametrize("at", range(1, 9))
def test_a_kill_at_every_call_of_the_second_write_leaves_a_readable_checkpoint(at, tmp_path):
    """fsync, rename, half a file, rotation: whichever it is, the newest checkpoint that can be read is whole."""
    from multicrafter.training.checkpoint import find_checkpoint, save_checkpoint

    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)}, keep=1)
    processes, _ = workers.start(write_once, str(tmp_path), at, tmp=tmp_path)
    processes[0].join(580)
    found = find_checkpoint(tmp_path)
    if killed(processes):
        assert found.step in (1, 2)
    else:
        assert found.step == 2
    assert torch.equal(found.tensors()["x"], torch.full((3,), float(found.step)))
    save_checkpoint(tmp_path, 3, {"x": torch.full((3,), 3.0)}, keep=1)
    assert [p.name for p in sorted(tmp_path.glob("*step*")) + sorted(tmp_path.glob(".*step*"))] == ["step_000003"]


def write_once(folder, at):
    from multicrafter.training.checkpoint import save_checkpoint

    workers.install_fault("write", at)
    save_checkpoint(Path(folder), 2, {"x": torch.full((3,), 2.0)}, keep=1)
