"""A thin resumable training loop: progress, metrics, atomic checkpoints, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm


class Interrupted(Exception):
    """Training was stopped by a signal after saving; ``resume`` says how to go on."""


class Stage(Protocol):
    """What the loop drives."""

    def step(self, index: int) -> dict[str, float]:
        """One training step; returns metrics."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything to restore, as tensors."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores `tensors`."""
        ...


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, flat: ``optimizer.<parameter>.<name>``."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value).clone()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], *, keep: int = 2) -> Path:
    """Writes ``folder/step_XXXXXX`` through a temporary name, synced; keeps the newest ``keep``."""
    target = folder / f"step_{step:06d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step}))
    for path in (*temporary.iterdir(), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, *, say: Callable[[str], None] = print) -> tuple[int, dict[str, Tensor]] | None:
    """The newest readable checkpoint, or None; a corrupt one is skipped, and said so."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            step = int(json.loads((path / "state.json").read_text())["step"])
            return step, load_file(path / "state.safetensors")
        except Exception as error:
            say(f"checkpoint {path} cannot be read ({type(error).__name__}): falling back to the one before")
    return None


def run(
    stage: Stage,
    *,
    num_steps: int,
    out: Path,
    resume: bool = False,
    save_every: int = 500,
    description: str = "train",
    config: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Runs ``stage`` to ``num_steps``; metrics go to ``out/metrics.jsonl``, checkpoints to ``out/checkpoints``.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    checkpoints, metrics_path = out / "checkpoints", out / "metrics.jsonl"
    start, history = 0, []
    if resume and (found := load_checkpoint(checkpoints)) is not None:
        start = found[0]
        stage.restore(found[1])
        history = (
            [json.loads(line) for line in metrics_path.read_text().splitlines()][:start]
            if metrics_path.exists()
            else []
        )
    elif not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    metrics_path.write_text("".join(json.dumps(m) + "\n" for m in history))
    stop: list[int] = []
    handlers = (
        {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        if _main_thread()
        else {}
    )
    try:
        with (
            metrics_path.open("a") as log,
            tqdm(total=num_steps, initial=start, desc=description, mininterval=1.0) as bar,
        ):
            for index in range(start, num_steps):
                metrics = {"step": index + 1, **stage.step(index)}
                history.append(metrics)
                log.write(json.dumps(metrics) + "\n")
                bar.update()
                bar.set_postfix(
                    {k: f"{v:.4g}" for k, v in metrics.items() if k in ("loss", "reward", "attention_loss")},
                    refresh=False,
                )
                if (index + 1) % save_every == 0 or index + 1 == num_steps or stop:
                    log.flush()
                    save_checkpoint(checkpoints, index + 1, stage.tensors())
                if stop and index + 1 < num_steps:
                    raise Interrupted(
                        f"stopped at step {index + 1} of {num_steps}; saved in {checkpoints}; go on with --resume"
                    )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return history


def _main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
