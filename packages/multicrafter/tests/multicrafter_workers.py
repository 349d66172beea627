"""Training in child processes, for tests that kill them or spread them: forked from a server that has everything imported."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gspo import OnlineConfig, SlidingWindow
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.training import checkpoint, distributed, loop
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.pretrain import Pretrain, PretrainConfig
from multicrafter.training.runs import with_execution
from multicrafter.training.scenes import encode_scenes
from multicrafter.world import WorldConfig
from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline
from safetensors.torch import save_file

SMALL = AdapterConfig(rank=4, alpha=4.0, num_experts=2)
STAGE1 = PretrainConfig(num_steps=20, batch=8, num_scenes=12, adapters=SMALL)
STAGE2 = AlignConfig(
    num_steps=20,
    prompts=4,
    online=OnlineConfig(window=SlidingWindow(5, interval=6), group_size=4),
    lr=1e-3,
    reward_wait_s=0.0,
)


class Brightness:
    """A reward that needs no judge."""

    def __call__(self, images, prompts, references):
        values = np.array([float(i.mean()) for i in images])
        return type("Score", (), {"totals": values, "parts": {"brightness": values}})()


def small_pipe():
    """The smallest FLUX, its zero-initialised output layer filled so that everything matters."""
    made = build_pipeline(
        TinyFluxConfig(num_heads=2, head_dim=16, num_double=1, num_single=1, vae_channels=(8, 8, 8), text_width=16)
    )
    generator = torch.Generator().manual_seed(1)
    for part in (made.transformer, made.vae, made.text_encoder, made.text_encoder_2):
        part.requires_grad_(False).eval()
    for parameter in made.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def make_stage(number, *, num_steps=20, execution=None, changes=None):
    """A stage of the small FLUX with everything that a checkpoint holds, the moving average too."""
    pipe = small_pipe()
    scenes = encode_scenes(pipe, WorldConfig(numbers=(2,), shared_attributes=4), 12, seed=3)
    execution = {"ema_decay": 0.9, **(execution or {})}
    if number == 1:
        config = replace(STAGE1, num_steps=num_steps, **(changes or {}))
        return Pretrain(pipe, with_execution(config, **execution), scenes)
    adapters = Adapters(pipe.transformer, SMALL)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    config = replace(STAGE2, num_steps=num_steps, **(changes or {}))
    return Align(pipe, adapters, with_execution(config, **execution), scenes, Brightness())


def warm():
    """Imports what diffusers, transformers and peft import when they are first used: once, in the server, not in every child."""
    torch.set_num_threads(1)
    Adapters(small_pipe().transformer, SMALL)


def save_state(stage, path):
    """Adapters, their last gradients and moving average, whole, from rank 0."""
    state = {f"ema.{n}": t for n, t in stage.trainee.ema.items()}
    for name, parameter in stage.adapters.named_parameters():
        state |= {name: parameter} if parameter.grad is None else {name: parameter, f"grad.{name}": parameter.grad}
    whole = {n: distributed.unsharded(t.detach()).contiguous() for n, t in state.items()}
    if distributed.is_main():
        save_file(whole, path)


def train(
    number, out, *, num_steps=20, resume=False, save_every=1000, execution=None, changes=None, fault=None, keep=2
):
    """Trains a stage; ``out/final.safetensors`` and ``out/history.json`` at the end."""
    if fault is not None:
        install_fault(*fault)
    stage = make_stage(number, num_steps=num_steps, execution=execution, changes=changes)
    history = loop.run(
        stage, num_steps=num_steps, out=Path(out), resume=resume, loop=loop.LoopConfig(save_every=save_every, keep=keep)
    )
    save_state(stage, Path(out) / "final.safetensors")
    if distributed.is_main():
        (Path(out) / "history.json").write_text(json.dumps(history))


def install_fault(kind, at):
    """Kills this process with SIGKILL at call number ``at`` of what a checkpoint does to the disk, or at training step ``at``."""
    count = {"calls": 0}

    def counted(function, before=None):
        def call(*args, **kwargs):
            count["calls"] += 1
            if count["calls"] == at:
                if before is not None:
                    before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def half_written(tensors, path):
        real_save(tensors, path)
        os.truncate(path, Path(path).stat().st_size // 2)

    if kind == "write":
        real_save = checkpoint.save_file
        checkpoint.save_file = counted(checkpoint.save_file, half_written)
        for name in ("fsync", "replace"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree)
    elif kind == "step":
        for cls in (Pretrain, Align):
            real = cls.step

            def step(self, index, real=real):
                if index == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(self, index)

            cls.step = step


def _child(target, args, kwargs, rank, world, store, errors):
    os.setpgrp()  # a signal to the tests is none to the workers
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  progress bars of many processes
    try:
        if world > 1:
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        with distributed.naming_lost_workers():
            target(*args, **kwargs)
            if world > 1:
                torch.distributed.barrier()
    except BaseException:
        Path(f"{errors}.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # torch's threads sometimes abort a clean exit


def context():
    """A server that forks children which need not import anything."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["multicrafter_warm_server"])
    # before 3.12 the server does not know sys.path, and what it cannot import it leaves out without a word (CPython 117378)
    here = str(Path(__file__).parent)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, path)])
    return made


def start(target, *args, world=1, tmp, **kwargs):
    """Starts ``world`` processes that run ``target(*args, **kwargs)`` as one torch.distributed group."""
    number = len(list(Path(tmp).glob("store*")))
    store, errors = Path(tmp) / f"store{number}", Path(tmp) / f"error{number}"
    (Path(tmp) / f"store{number}.used").touch()
    processes = [
        context().Process(target=_child, args=(target, args, kwargs, rank, world, str(store), str(errors)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes, errors


def run(target, *args, world=1, tmp, expect=0, **kwargs):
    """`start`, then waits; returns what the ranks raised."""
    processes, errors = start(target, *args, world=world, tmp=tmp, **kwargs)
    for process in processes:
        process.join(580)
        if process.is_alive():
            process.kill()
            raise AssertionError("a worker hangs")
    raised = [path.read_text() for path in sorted(errors.parent.glob(errors.name + ".*"))]
    if expect == 0:
        assert not raised, raised[0]
        assert [p.exitcode for p in processes] == [0] * world
    return raised
