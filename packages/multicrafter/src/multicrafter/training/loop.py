"""The training loop: progress, metrics, trackers, checkpoints, signals, resuming, steps that went wrong.

What is lost when something happens: docs/guides/recovery.md.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from multicrafter import UserError, __version__
from multicrafter.models.checks import check_finite
from multicrafter.training import distributed
from multicrafter.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints_in,
    find_checkpoint,
    restore_rng,
    rng_tensors,
    save_checkpoint,
    write_atomic,
)
from multicrafter.training.run_folder import alone, give_up_branch, start_over
from multicrafter.training.trackers import NoTracker, Tracker

logger = logging.getLogger(__name__)
Resume = bool | str | Path


class Interrupted(Exception):
    """Training was stopped by a signal after saving; ``resume`` says how to go on."""


class Diverged(UserError):
    """Too many steps in a row had to be skipped."""


class Stage(Protocol):
    """What the loop drives.

    A stage may also have ``notes() -> dict`` (JSON for the checkpoint: routing, window, ...), ``check_notes(dict)`` (raises ValueError
    if a checkpoint does not fit), ``preview() -> Preview`` (pictures and scalars for the tracker), and ``finished() -> str | None`` (why
    the run should end before its last step; equal on all ranks).
    """

    def step(self, index: int) -> dict[str, float]:
        """One training step; returns metrics, equal on all ranks. "skipped" counts updates that were not made."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything to restore, as tensors."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run is kept safe.

    Attributes:
        save_every: Steps between checkpoints.
        keep: Newest checkpoints kept; the best one stays besides.
        best: Metric whose mean since the last checkpoint says which one is best; None keeps none besides.
        best_is: Whether "lowest" or "highest" is best.
        max_skipped: Steps in a row without a finite loss or gradient after which the run stops.
        max_failed_saves: Checkpoints in a row that could not be written after which the run stops.
        picture_every: Steps between pictures for the tracker; 0 draws none.
    """

    save_every: int = 500
    keep: int = 2
    best: str | None = "loss"
    best_is: Literal["lowest", "highest"] = "lowest"
    max_skipped: int = 10
    max_failed_saves: int = 3
    picture_every: int = 0

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("save_every", "keep", "max_skipped", "max_failed_saves"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.picture_every < 0:
            raise UserError(f"picture_every must not be negative, got {self.picture_every}")

    def score(self, history: list[dict[str, float]]) -> float | None:
        """Mean of the chosen metric over these steps, higher is better; None where it has no finite value."""
        values = [m[self.best] for m in history if self.best in m and math.isfinite(m[self.best])] if self.best else []
        if not values:
            return None
        return sum(values) / len(values) * (1 if self.best_is == "highest" else -1)


def load_checkpoint(folder: Path) -> tuple[int, Mapping[str, Tensor]] | None:
    """Step and tensors of the newest readable checkpoint, or None; a corrupt one is skipped, and said so."""
    found = find_checkpoint(folder)
    return None if found is None else (found.step, found.tensors())


def run(
    stage: Stage,
    *,
    num_steps: int,
    out: Path,
    resume: Resume = False,
    save_every: int | None = None,
    description: str = "train",
    config: dict[str, Any] | None = None,
    loop: LoopConfig | None = None,
    tracker: Tracker | None = None,
) -> list[dict[str, float]]:
    """Runs ``stage`` to ``num_steps``; metrics go to ``out/metrics.jsonl``, checkpoints to ``out/checkpoints``.

    Args:
        stage: What to train; on every rank.
        num_steps: Steps in all, those before resuming included.
        out: Folder of the run, the same for all ranks.
        resume: False starts over (what an earlier run left moves to ``checkpoints.previous``, ``checkpoints.previous-2``, ...); True or
            "auto" goes on from the newest good checkpoint, or starts if there is none; a path goes on from that checkpoint, and those
            of the branch that is given up move to ``checkpoints.abandoned``, ... A checkpoint that has ``num_steps`` already is only
            restored: nothing on the disk changes.
        save_every: Short for ``loop.save_every``.
        description: Of the progress bar.
        config: Written to ``out/config.json``.
        loop: See `LoopConfig`.
        tracker: Where metrics and pictures go besides.

    Raises:
        ValueError: Another run is writing into ``out``.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        Diverged: ``max_skipped`` steps in a row were skipped.
        CheckpointError: The last checkpoint, or ``max_failed_saves`` in a row, could not be written; or none to resume from is readable.
    """
    settings = loop or LoopConfig()
    every = save_every or settings.save_every
    watched = tracker is not None and not isinstance(tracker, NoTracker) and hasattr(stage, "preview")
    tracker = tracker if tracker is not None and distributed.is_main() else NoTracker()
    checkpoints, log = out / "checkpoints", _Log(out / "metrics.jsonl")
    with alone(out):
        found = _find(checkpoints, resume)
        start = _restore(stage, found)
        if found is not None and start >= num_steps:
            return log.read(start)
        _prepare(out, checkpoints, config, found=found)
        history = log.restart(start)
        return _train(
            stage, start=start, num_steps=num_steps, every=every, checkpoints=checkpoints, log=log, history=history,
            description=description, settings=settings, tracker=tracker, watched=watched,
        )  # fmt: skip


def _train(
    stage: Stage, *, start: int, num_steps: int, every: int, checkpoints: Path, log: _Log, history: list[dict[str, float]],
    description: str, settings: LoopConfig, tracker: Tracker, watched: bool,
) -> list[dict[str, float]]:  # fmt: skip
    """The steps from ``start`` on; see `run`."""
    saved, failed, skipped = start, 0, 0
    with (
        _signals() as stop,
        log,
        tracker,
        tqdm(total=num_steps, initial=start, desc=description, mininterval=1.0, disable=not _main()) as bar,
    ):
        for index in range(start, num_steps):
            metrics = {"step": index + 1, **stage.step(index)}
            skipped = skipped + 1 if metrics.get("skipped") else 0
            history.append(metrics)
            log.write(metrics)
            tracker.metrics(index + 1, metrics)
            if settings.picture_every and watched and (index + 1) % settings.picture_every == 0:
                preview = stage.preview()  # type: ignore[attr-defined]
                tracker.metrics(index + 1, preview.metrics)
                tracker.pictures(index + 1, preview.pictures)
            bar.update()
            bar.set_postfix(_shown(metrics), refresh=False)
            stopping, finished = distributed.any_rank(bool(stop)), _finished(stage)
            last = index + 1 == num_steps or finished is not None
            if (index + 1) % every == 0 or last or stopping:
                log.sync()
                tensors = stage.tensors()
                if distributed.any_rank(bool(broken := _broken(tensors))):
                    raise Diverged(
                        f"adapter must be finite, but {broken or 'a tensor of another rank'} holds NaN or infinity at step {index + 1}; "
                        f"the newest checkpoint is of step {saved}: lower the learning rate, or look at the data"
                    )
                try:
                    save_checkpoint(
                        checkpoints,
                        index + 1,
                        {**tensors, **rng_tensors()},
                        keep=settings.keep,
                        notes=_notes(stage),
                        score=settings.score(history[-(index + 1 - saved) :]),
                    )
                    saved, failed = index + 1, 0
                except CheckpointError as error:
                    failed += 1
                    if last or stopping or failed >= settings.max_failed_saves:
                        raise
                    _say(f"{error.strerror}; going on, the newest checkpoint is of step {saved}")
            if finished is not None:
                _say(f"ending at step {index + 1} of {num_steps}: {finished}")
                break
            if skipped >= settings.max_skipped:
                raise Diverged(
                    f"loss must be finite, but the last {skipped} steps had to be skipped (step {index + 1}); "
                    f"the newest checkpoint is of step {saved}: lower the learning rate, or look at the data"
                )
            if stopping and not last:
                raise Interrupted(
                    f"stopped at step {index + 1} of {num_steps}; saved in {checkpoints}; go on with --resume, or take the adapter as it is "
                    f"with --resume --steps {index + 1}"
                )
    return history


def _main() -> bool:
    return distributed.is_main()


def _say(text: str, level: int = logging.WARNING) -> None:
    if _main():
        logger.log(level, text)


def _broken(tensors: Mapping[str, Tensor]) -> str:
    """The first trained tensor that is not finite, by name; this rank's part of it."""
    for key, tensor in tensors.items():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if key.startswith(("adapters.", "ema.")) and not bool(torch.isfinite(part).all()):
            return key
    return ""


def _shown(metrics: dict[str, float]) -> dict[str, str]:
    return {k: f"{v:.4g}" for k, v in metrics.items() if k in ("loss", "reward", "attention_loss")}


def _finished(stage: Stage) -> str | None:
    found: str | None = stage.finished() if hasattr(stage, "finished") else None
    return found


def _notes(stage: Stage) -> dict[str, Any]:
    return dict(stage.notes()) if hasattr(stage, "notes") else {}


def _prepare(out: Path, checkpoints: Path, config: dict[str, Any] | None, *, found: Checkpoint | None) -> None:
    """The folder, its config, and what an earlier run left out of the way: a forgotten --resume must not cost it."""
    if _main():
        if found is None:
            start_over(out, checkpoints)
        else:
            give_up_branch(out, checkpoints, found)
        if config is not None:
            write_atomic(out / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    distributed.broadcast_object(None)


def _find(checkpoints: Path, resume: Resume) -> Checkpoint | None:
    """The checkpoint to go on from."""
    if resume is False or resume == "never":
        return None
    if resume is not True and resume != "auto":
        return Checkpoint.open(Path(resume))
    found = find_checkpoint(checkpoints)
    if found is None and checkpoints_in(checkpoints):
        raise CheckpointError(
            f"{checkpoints} must hold a readable checkpoint to resume from, but all of them are damaged"
        )
    return found


def _restore(stage: Stage, found: Checkpoint | None) -> int:
    """Restores the stage; returns the step to go on from."""
    if found is None:
        return 0
    if (code := found.manifest["code"]["multicrafter"]) != __version__:
        _say(f"{found.path} was written by multicrafter {code}, this is {__version__}")
    if hasattr(stage, "check_notes"):
        stage.check_notes(found.manifest["notes"])
    tensors = found.tensors()
    stage.restore(tensors)
    restore_rng(tensors)
    _say(f"resumed from {found.path}", logging.INFO)
    return found.step


class _Log:
    """``metrics.jsonl``, written by rank 0 only. A full disk does not stop training: the line is lost, and said so once."""

    def __init__(self, path: Path) -> None:
        self.path, self.broken = path, False
        self.file: Any = None

    def restart(self, steps: int) -> list[dict[str, float]]:
        """`read`, written back: later steps, which will be made anew, and a torn last line are dropped."""
        history = self.read(steps)
        if _main():
            write_atomic(self.path, "".join(json.dumps(m) + "\n" for m in history))
        return history

    def read(self, steps: int) -> list[dict[str, float]]:
        """The metrics of the first ``steps`` steps, the same on every rank."""
        history: list[dict[str, float]] = []
        if steps and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    metrics = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if not isinstance(metrics, dict) or "step" not in metrics:
                    continue
                if metrics["step"] <= steps:
                    history.append(metrics)
        read: list[dict[str, float]] = distributed.broadcast_object(history)
        return read

    def __enter__(self) -> _Log:
        self.file = self.path.open("a") if _main() else None
        return self

    def __exit__(self, *_: object) -> None:
        self._guarded(lambda file: file.close())

    def write(self, metrics: dict[str, float]) -> None:
        self._guarded(lambda file: file.write(json.dumps(metrics) + "\n"))

    def sync(self) -> None:
        self._guarded(lambda file: file.flush())

    def _guarded(self, action: Callable[[Any], object]) -> None:
        if self.file is None:
            return
        try:
            action(self.file)
        except OSError as error:
            if not self.broken:
                _say(f"{self.path} cannot be written ({error.strerror}); training goes on without it")
            self.broken = True


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second SIGINT stops at once."""
    stop: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(number)
        _say(f"{signal.Signals(number).name}: saving after this step", logging.INFO)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
