"""Several gloo processes equal one: losses, gradients, adapters; checkpoints move between numbers of them; a dead one is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gspo
import multicrafter_workers as workers
import numpy as np
import pytest
import torch
from multicrafter import UserError
from multicrafter.training import checkpoint, distributed
from multicrafter.training.checkpoint import find_checkpoint
from multicrafter.training.distributed import my_groups, my_slice
from multicrafter.training.noise import SlicedNoise
from multicrafter.training.scenes import Buckets
from multicrafter.training.trainee import global_aux_loss
from safetensors.torch import load_file

STEPS = 8
TOLERANCE = 1e-5
slow = pytest.mark.slow


def final(folder):
    return load_file(folder / "final.safetensors")


def history(folder):
    return json.loads((folder / "history.json").read_text())


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Stage, changes -> folder of the run in one process, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def get(stage, *, steps=STEPS, **changes):
        key = (stage, steps, json.dumps(changes))
        if key not in made:
            out = folder / f"run{len(made)}"
            workers.run(workers.train, stage, out, num_steps=steps, changes=changes, tmp=folder)
            made[key] = out
        return made[key]

    return get


# batches that do not divide, groups that are cut between ranks in either way
EVEN: dict[int, dict] = {1: {"batch": 7}, 2: {"prompts": 2}}
CUT: dict[int, dict] = {2: {"prompts": 3}}


@pytest.mark.parametrize(
    ("stage", "world", "parallel", "changes"),
    [
        (1, 2, "fsdp", EVEN[1]),
        (2, 2, "ddp", EVEN[2]),
        (1, 2, "ddp", EVEN[1]),
        (2, 2, "fsdp", EVEN[2]),
        (2, 2, "ddp", CUT[2]),
        (2, 2, "fsdp", CUT[2]),
        pytest.param(1, 4, "ddp", EVEN[1], marks=slow),
        pytest.param(1, 4, "fsdp", EVEN[1], marks=slow),
        pytest.param(2, 4, "ddp", EVEN[2], marks=slow),
        pytest.param(2, 4, "fsdp", EVEN[2], marks=slow),
    ],
)
def test_many_processes_equal_one(stage, world, parallel, changes, alone, tmp_path):
    # a cut group is a batch of another size, which rounds otherwise: 3e-6 for six steps, until a router sends one token elsewhere
    steps = 6 if changes == CUT.get(stage) else STEPS
    want = alone(stage, steps=steps, **changes)
    workers.run(
        workers.train, stage, tmp_path / "run", num_steps=steps, world=world, tmp=tmp_path,
        execution={"parallel": parallel}, changes=changes,
    )  # fmt: skip
    assert distance(final(want), final(tmp_path / "run")) < TOLERANCE  # adapters, last gradients, moving average
    for a, b in zip(history(want), history(tmp_path / "run"), strict=True):
        for name in ("loss", "attention_loss", "reward", "reward_spread", "window", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=TOLERANCE), (name, a["step"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_divergence_penalty_and_micro_batches_change_nothing_across_ranks(stage, parallel, alone, tmp_path):
    """Stage 1 without experts, whose losses are those of a micro-batch; in stage 2 parts of a rollout, and a pass with adapters off."""
    plain = replace(workers.SMALL, num_experts=0)
    penalised = replace(workers.STAGE2.online, policy=gspo.PolicyConfig(kl_coef=0.1))
    changes = {"online": penalised} if stage == 2 else {"batch": 6, "adapters": plain}
    folder = tmp_path / "one"
    workers.run(workers.train, stage, folder, num_steps=4, changes=changes, tmp=tmp_path)
    execution = {"parallel": parallel, "gradient_checkpointing": True, "micro_batch": 2}
    workers.run(
        workers.train, stage, tmp_path / "two", num_steps=4, world=2, tmp=tmp_path, execution=execution, changes=changes
    )
    assert distance(final(folder), final(tmp_path / "two")) < TOLERANCE


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(4, 2, marks=slow), (1, 2)])
@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_checkpoints_reload_into_another_number_of_ranks(stage, before, after, alone, tmp_path):
    changes = EVEN[2] if stage == 2 else {}
    want, out, sharded = (
        alone(stage, **changes),
        tmp_path / "run",
        {"execution": {"parallel": "fsdp"}, "changes": changes},
    )
    workers.run(train_until, stage, out, STEPS // 2, world=before, tmp=tmp_path, **sharded)
    found = find_checkpoint(out / "checkpoints")
    assert found.manifest["world_size"] == before
    if before > 1:
        assert len(found.manifest["files"]) == before and found.manifest["shards"]
    workers.run(workers.train, stage, out, num_steps=STEPS, resume="auto", world=after, tmp=tmp_path, **sharded)
    assert distance(final(want), final(out)) < TOLERANCE


def train_until(stage, out, stop, **options):
    """The first ``stop`` steps of a run of all (the learning rate follows the whole), ended by a signal."""
    import os
    import signal

    from multicrafter.training import loop

    made = workers.make_stage(stage, num_steps=STEPS, **options)
    real = made.step

    def step(index):
        metrics = real(index)
        if index + 1 == stop and distributed.rank() == distributed.world_size() - 1:  # one rank gets it, all stop
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    made.step = step
    try:
        loop.run(made, num_steps=STEPS, out=Path(out))
    except loop.Interrupted:
        return
    raise AssertionError("a signal to one rank must stop all")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_dead_worker_is_named_and_the_run_goes_on_from_its_checkpoint(stage, tmp_path):
    changes = EVEN[2] if stage == 2 else {}
    workers.run(workers.train, stage, tmp_path / "straight", num_steps=8, changes=changes, world=2, tmp=tmp_path)
    processes, errors = workers.start(
        train_and_lose_one, stage, tmp_path / "run", world=2, tmp=tmp_path, changes=changes
    )
    for process in processes:
        process.join(580)
    assert processes[1].exitcode == -9 and processes[0].exitcode == 1
    said = Path(f"{errors}.0").read_text()
    assert "WorkerLost" in said and "--resume auto" in said
    assert find_checkpoint(tmp_path / "run" / "checkpoints").step == 4
    workers.run(
        workers.train, stage, tmp_path / "run", num_steps=8, resume="auto", changes=changes, world=2, tmp=tmp_path
    )
    assert distance(final(tmp_path / "straight"), final(tmp_path / "run")) == 0.0


def train_and_lose_one(stage, out, changes):
    if distributed.rank() == 1:
        workers.install_fault("step", 5)
    workers.train(stage, out, num_steps=8, save_every=2, changes=changes)


def full_on_one(out):
    """Rank 1's disk is full: no rank may believe that the checkpoint is there."""
    from multicrafter.training.checkpoint import CheckpointError, save_checkpoint

    save_checkpoint(Path(out), 1, {"x": torch.ones(2)})
    if distributed.rank() == 1:

        def refuse(*_):
            raise OSError(28, "No space left on device")

        checkpoint.save_file = refuse
    with pytest.raises(CheckpointError, match=r"No space left.*rank 1"):
        save_checkpoint(Path(out), 2, {"x": torch.ones(2)})


def test_a_full_disk_of_one_rank_is_an_error_of_all(tmp_path):
    workers.run(full_on_one, str(tmp_path / "c"), world=2, tmp=tmp_path)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_000001"]


def own_random_numbers(out):
    """Ranks draw different numbers, and each goes on with its own."""
    torch.manual_seed(distributed.rank())
    checkpoint.save_checkpoint(Path(out), 1, checkpoint.rng_tensors())
    want = torch.rand(3)
    assert len({tuple(x) for x in distributed.gather_objects(want.tolist())}) == distributed.world_size()
    torch.manual_seed(99)
    checkpoint.restore_rng(find_checkpoint(Path(out)).tensors())
    assert torch.equal(torch.rand(3), want)


def test_every_rank_has_its_own_generator(tmp_path):
    workers.run(own_random_numbers, str(tmp_path / "c"), world=2, tmp=tmp_path)


def nan_on_one(out):
    made = workers.make_stage(1)
    made.step(0)
    before = {n: p.detach().clone() for n, p in made.adapters.named_parameters()}
    if distributed.rank() == 1:
        made.buckets.buckets[0].tokens[:] = torch.nan
    metrics = made.step(1)
    assert metrics["skipped"] == 1
    assert all(torch.equal(before[n], p) for n, p in made.adapters.named_parameters())


def test_a_nan_on_one_rank_is_skipped_by_all(tmp_path):
    workers.run(nan_on_one, str(tmp_path), world=2, tmp=tmp_path)


def loads_are_global(out):
    """The balance loss of two halves, averaged, has the gradient of the whole."""
    made = workers.make_stage(1)
    experts, scenes = made.adapters.experts, made.buckets.buckets[0]
    rows = torch.arange(8)

    def gradient(part, loss):
        made.optimizer.zero_grad()
        text = made.text([scenes.captions[r] for r in rows[part].tolist()])
        made.trainee.adapters.backbone.velocity(
            made.transformer,
            scenes.tokens[rows[part]],
            torch.full((len(rows[part]),), 0.5),
            text,
            **scenes.context(rows[part]),
        )
        loss().backward()
        return {n: p.grad.clone() for n, p in made.adapters.named_parameters() if p.grad is not None}

    want = gradient(slice(0, 8), experts.aux_loss)
    got = gradient(my_slice(8), lambda: global_aux_loss(experts))
    assert want.keys() == got.keys() and any("router" in n for n in want)
    for name, value in got.items():
        mean = distributed.all_sum(value) / 2
        assert torch.allclose(mean, want[name], atol=1e-8), name


def test_expert_loads_are_counted_over_all_ranks(tmp_path):
    workers.run(loads_are_global, str(tmp_path), world=2, tmp=tmp_path)


def test_the_old_name_of_shared_groups_is_gspos_and_says_so():
    with pytest.warns(DeprecationWarning, match=r"my_groups is now gspo.share_groups"):
        share = my_groups(2, 6, rank_=3, ranks=4)
    assert share == gspo.share_groups(2, 6, rank=3, num_ranks=4) and share.num_members == 3


@pytest.mark.parametrize("rows", [range(6), [1, 4]])
def test_the_old_name_of_shared_noise_draws_the_same_and_says_so(rows):
    x, v, mine = torch.randn(6, 4, 3), torch.randn(6, 4, 3), torch.tensor(list(rows))
    whole = gspo.FlowSDE().step(x, v, 0.8, 0.6, generator=torch.Generator().manual_seed(5))
    with pytest.warns(DeprecationWarning, match=r"SlicedNoise is now gspo.shared_noise"):
        sliced = SlicedNoise(gspo.FlowSDE(), mine, 6)
    part = sliced.step(x[mine], v[mine], 0.8, 0.6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(part.next_latents, whole.next_latents[mine])
    again = sliced.step(x[mine], v[mine], 0.8, 0.6, next_latents=part.next_latents)
    torch.testing.assert_close(again.log_prob_mean, whole.log_prob_mean[mine])


def test_a_batch_that_does_not_spread_over_the_processes_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr("multicrafter.training.align.world_size", lambda: 7)
    with pytest.raises(UserError, match="must spread evenly over 7 processes"):
        workers.make_stage(2)


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="at least one row per process"):
        my_slice(3, rank_=0, ranks=4)
    assert sum((lambda s: s.stop - s.start)(my_slice(11, rank_=r, ranks=4)) for r in range(4)) == 11


def test_buckets_never_mix_layouts_and_every_scene_is_equally_likely():
    class Scenes(list):
        captions = ()

    small, large = Scenes(range(10)), Scenes(range(30))
    buckets, generator = Buckets([small, large]), torch.Generator().manual_seed(0)
    drawn = np.mean([len(buckets.draw(generator)) == 30 for _ in range(2000)])
    assert abs(drawn - 0.75) < 0.04
    with pytest.raises(ValueError, match="at least one scene"):
        Buckets([small, Scenes()])


@slow
def test_the_command_line_under_torchrun_trains_the_adapter_of_one_process(tmp_path):
    """Both stages as a user starts them; the model that ships."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(ranks, *arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        command = [*(launcher if ranks > 1 else [sys.executable]), "-m", "multicrafter", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("adapter: ") == 1, "one rank speaks"

    def adapter(folder):
        return load_file(folder / "adapter" / "adapter.safetensors")

    small1 = ("--row", "moe", "--steps", 3, "--scenes", 12, "--batch", 5)
    start(1, "pretrain", "--out", tmp_path / "one1", *small1)
    start(2, "pretrain", "--out", tmp_path / "two1", *small1)
    assert distance(adapter(tmp_path / "one1"), adapter(tmp_path / "two1")) < TOLERANCE
    # the average is what is saved, a twentieth of one step: at a larger rate it is seen
    options = ["--steps", "1", "--prompts", "2", "--group-size", "3", "--set", "align.lr=5e-3"]
    small2 = ("--adapter", tmp_path / "one1" / "adapter", *options)
    start(1, "align", "--out", tmp_path / "one2", *small2)
    start(2, "align", "--out", tmp_path / "two2", *small2, "--set", "align.execution.parallel=fsdp")
    assert distance(adapter(tmp_path / "one1"), adapter(tmp_path / "one2")) > 5 * TOLERANCE, "it trains"
    assert distance(adapter(tmp_path / "one2"), adapter(tmp_path / "two2")) < TOLERANCE
