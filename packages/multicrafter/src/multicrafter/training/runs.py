"""Whole runs of a stage: data, loop, adapter on disk. On every rank; rank 0 writes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multicrafter import UserError
from multicrafter.files import read_json
from multicrafter.models.adapters import Adapters
from multicrafter.models.finding import Finder, IdentityFinder
from multicrafter.models.loaded import LoadedModel
from multicrafter.training import loop
from multicrafter.training.align import Align, Watcher
from multicrafter.training.align_config import AlignConfig, filled, modern
from multicrafter.training.checkpoint import Checkpoint, checkpoints_in, find_checkpoint
from multicrafter.training.distributed import is_main
from multicrafter.training.loop import LoopConfig
from multicrafter.training.photo_scenes import encode_by_number
from multicrafter.training.pretrain import Pretrain
from multicrafter.training.pretrain_config import PretrainConfig, sampling_notes
from multicrafter.training.rewarding import Reward, photo_judges
from multicrafter.training.scenes import EncodedScenes, encode_shaped_scenes
from multicrafter.training.trackers import Tracker
from multicrafter.world import WorldConfig, judges
from multicrafter.world.judges.people import PeopleBackend
from multicrafter.world.rewards import tiny_reward

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FREE = ("parallel", "cache", "micro_batch", "compile_blocks")  # of ExecutionConfig: may differ when a run goes on


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    execution = {k: v for k, v in (config.get("execution") or {}).items() if k not in FREE}
    known = json.loads(json.dumps(config, default=str))
    known.pop("loop", None)  # how often something is written may change
    return {**known, "execution": execution}


def _changed(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted names of the values that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [name for key in now for name in _changed(before.get(key), now[key], f"{path}.{key}".lstrip("."))]
    return [] if before == now else [path]


def _check_resume(out: Path, run: PretrainConfig | AlignConfig, resume: loop.Resume) -> None:
    """Going on under another configuration would be neither run; to stop where a checkpoint is, is no going on."""
    path = out / "config.json"
    if not path.exists() or not checkpoints_in(out / "checkpoints"):
        return
    # what an earlier version did not write down was what the defaults are
    written = read_json(path)
    if not isinstance(written, dict):
        raise UserError(f"{path} must be the configuration of a run, got {type(written).__name__}")
    if isinstance(run, AlignConfig):
        written = modern(written)
    before = _comparable(filled(written, asdict(type(run)())))
    now = _comparable(asdict(run))
    changed = _changed(before, now)
    if changed == ["num_steps"]:
        auto = isinstance(resume, bool) or resume == "auto"
        found = find_checkpoint(out / "checkpoints") if auto else Checkpoint.open(Path(str(resume)))
        if found is not None and found.step == run.num_steps:
            return
    if changed:
        raise UserError(f"--resume needs the configuration of {path}, but {', '.join(changed)} changed")


def training_scenes(
    model: LoadedModel | DiffusionPipeline, config: PretrainConfig
) -> EncodedScenes | Sequence[EncodedScenes]:
    """What stage 1 trains on: drawn scenes, or the photos of ``config.data``."""
    return _scenes(model, config, config.world, config.num_scenes, seed=config.data_seed, keep_references=False)


def _scenes(
    model: LoadedModel | DiffusionPipeline,
    config: PretrainConfig | AlignConfig,
    world: WorldConfig,
    count: int,
    *,
    seed: int,
    keep_references: bool,
) -> Sequence[EncodedScenes]:
    """Drawn scenes, or photos, in the shapes of a stage or else those of the world."""
    shapes, small, cache = config.shapes, config.reference_shapes, config.execution.cache
    if config.data is None:
        return encode_shaped_scenes(model, world, count, shapes, reference_shapes=small, seed=seed, cache=cache)
    return encode_by_number(
        model, config.data, count, size=world.size, reference_size=world.reference_size, shapes=shapes or (world.height_width,),
        reference_shapes=small or (None if world.reference_shape is None else (world.reference_shape,)),
        references_per_subject=world.references_per_subject, seed=seed,
        cache=cache, keep_references=keep_references, progress=is_main() and sys.stderr.isatty(),
    )  # fmt: skip


def prompt_scenes(
    model: LoadedModel | DiffusionPipeline, config: AlignConfig, world: WorldConfig, count: int
) -> Sequence[EncodedScenes]:
    """Whose prompts and references stage 2 takes: drawn scenes, or samples of the photos of ``config.data``, in the sizes of ``world``."""
    return _scenes(model, config, world, count, seed=config.online.seed + 10_000, keep_references=True)


def run_pretrain(
    model: LoadedModel | DiffusionPipeline,
    config: PretrainConfig,
    out: Path,
    *,
    scenes: EncodedScenes | Sequence[EncodedScenes] | None = None,
    resume: loop.Resume = False,
    settings: LoopConfig | None = None,
    tracker: Tracker | None = None,
) -> Adapters:
    """Stage 1 into ``out``: config.json, metrics.jsonl, checkpoints/, adapter/.

    ``scenes`` spares drawing or reading them anew; ``settings`` stand in for ``config.loop``.
    """
    if resume:
        _check_resume(out, config, resume)
    scenes = scenes or training_scenes(model, config)
    stage = Pretrain(model, config, scenes)
    loop.run(
        stage,
        num_steps=config.num_steps,
        out=out,
        resume=resume,
        description="stage 1",
        config=asdict(config),
        loop=settings or config.loop,
        tracker=tracker,
    )
    before = int(stage.adapters.notes.get("steps", 0))
    stage.trainee.save(
        out, stage=1, steps=before + config.num_steps, sampling=sampling_notes(config), **shown(stage.buckets.buckets, stage.model.token_side),
    )  # fmt: skip
    return stage.adapters


def run_align(
    model: LoadedModel | DiffusionPipeline,
    adapters: Adapters,
    config: AlignConfig,
    out: Path,
    *,
    num_references: int = 2,
    family: str = "people",
    scenes: EncodedScenes | Sequence[EncodedScenes] | None = None,
    resume: loop.Resume = False,
    reward: Reward | None = None,
    finder: Finder | None = None,
    watcher: Watcher | None = None,
    settings: LoopConfig | None = None,
    tracker: Tracker | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Stage 2 into ``out``, as `run_pretrain`; returns the metrics of every iteration.

    Without ``scenes`` prompts and references are those of ``config.data``, or drawn from the tiny world's ``family``, at the sizes that the
    adapter was trained at, or in ``config.shapes``; several `EncodedScenes`, drawn or of photos, are buckets of different shapes. Without
    ``reward`` it is made of ``config.scorers`` where ``config.data`` is given, and so are finder and watcher; else it is the tiny world's, of
    people, and so is what finds subjects in drafts, and who watches has to be given (`multicrafter.scoring.watcher.drawn_watcher`).
    ``sampling`` is what the stage-1 adapter says of how its pictures are drawn; the new one says the same.
    """
    if resume:
        _check_resume(out, config, resume)
    if reward is None and config.data is not None:
        reward, found, watching = photo_judges(config.reward, config.scorers)
        finder, watcher = finder or found, watcher or watching
    elif reward is None:
        finder = finder or IdentityFinder(backend=PeopleBackend.from_pretrained(judges.shipped()))
    sizes: dict[str, Any] = {**trained_sizes(adapters.notes)}
    world = WorldConfig(family=family, numbers=(num_references,), shared_attributes=4, **sizes)
    scenes = scenes or prompt_scenes(model, config, world, 512)
    stage = Align(model, adapters, config, scenes, reward or tiny_reward(config.reward), finder=finder, watcher=watcher)
    history = loop.run(
        stage,
        num_steps=config.num_steps,
        out=out,
        resume=resume,
        description="stage 2",
        config=asdict(config),
        loop=settings or config.loop,
        tracker=tracker,
    )
    stage.finish()
    stage.trainee.save(
        out, stage=2, steps=config.num_steps, sampling=dict(sampling or {}), **shown(stage.buckets.buckets, stage.model.token_side),
    )  # fmt: skip
    return history


def shown(buckets: Sequence[EncodedScenes], token_side: int) -> dict[str, int]:
    """What was trained on, for the adapter's notes: people, references of each, and sides of pictures and references in pixels.

    Sides are those of the first bucket; of what is no square, those of a square as large.
    """
    sides = {"size": buckets[0].grid, "reference_size": buckets[0].reference_grid}
    most = {
        "num_references": max(b.num_subjects for b in buckets),
        "references_per_subject": max(b.references_per_subject for b in buckets),
    }
    return most | {name: round(math.sqrt(rows * columns)) * token_side for name, (rows, columns) in sides.items()}


def trained_sizes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Sides of pictures and references that an adapter was trained at, as its notes say.

    >>> trained_sizes({"size": 96, "stage": 1})
    {'size': 96}
    """
    return {name: int(notes[name]) for name in ("size", "reference_size") if notes.get(name)}


def with_execution(config: Any, **changes: Any) -> Any:
    """A stage's config with some of its ``execution`` changed.

    >>> with_execution(PretrainConfig(), dtype="bfloat16").execution.dtype
    'bfloat16'
    """
    return replace(config, execution=replace(config.execution, **changes))
