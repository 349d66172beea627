"""How much memory, arithmetic, traffic and time a run takes, before it starts and without weights.

The stage's own code runs on fake tensors under a `MemoryTracker`; what fake tensors cannot show (sharding, quantised weights, 8-bit states) is
arithmetic on top. Checked against measured peaks: docs/results/plan.md.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from multicrafter import UserError
from multicrafter.config.recipes import Run, Stage1, Stage2
from multicrafter.models.backbones import BACKBONES, Backbone, get_backbone
from multicrafter.models.placing import quantized_linears, transformer_blocks
from multicrafter.plan.hardware import EFFICIENCY, FRAGMENTATION, FUSION, RESERVED, Card
from multicrafter.plan.steps import PlannedPolicy, PlannedPretrain, Shape, align_evaluations, build
from multicrafter.plan.tracker import Answers, MemoryTracker, bytes_of
from multicrafter.training.align import online_config
from multicrafter.training.photo_scenes import training_records

NF4_BYTES = 0.5 + 4 / 64  # half a byte a weight and an fp32 scale per 64
INT8_BYTES = 1.0  # also of fp8; and a scale per row, which is nothing
ADAM8_BYTES = 2 * (1 + 4 / 256)  # two states of a byte and an fp32 scale per 256


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward and backward pass of one process's rows takes, from fake tensors.

    Attributes:
        rows: Samples in it.
        base, adapters, optimizer, gradients: Bytes that stay.
        peak: Largest number of live bytes, everything included.
        block: Bytes of the largest transformer block's frozen weights.
        linears: Bytes of the weights that quantisation would replace.
        linear: Bytes of the largest of them.
        flops: Of forward, backward and recomputation.
        forward_flops: Of one function evaluation.
        moved: Bytes read and written, unfused.
        forward_moved: Of one function evaluation.
    """

    rows: int
    base: float
    adapters: float
    optimizer: float
    gradients: float
    peak: float
    block: float
    linears: float
    linear: float
    flops: float
    forward_flops: float
    moved: float
    forward_moved: float

    @property
    def activations(self) -> float:
        """What is live at the peak beside weights and optimizer: activations, and the gradients there are by then."""
        return self.peak - self.base - self.adapters - self.optimizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on ``gpus`` cards of one kind. Bytes per card; FLOPs, bytes moved and seconds per optimizer step (or iteration).

    Attributes:
        parts: Bytes by name: base, adapters, optimizer, activations (with gradients), encoders, unsharded blocks.
        peak: Their sum.
        needed: Peak, fragmentation and what the device reserves.
        loading: Bytes at the most before the first step: text encoders and VAE that encode, or the weights that are brought and quantised.
        cached: Bytes of encoded data on the host.
        flops: All cards.
        moved: All cards, unfused.
        exchanged: Bytes that each card sends.
        seconds: Estimated.
    """

    gpus: int
    card: Card
    parts: dict[str, float]
    loading: float
    cached: float
    flops: float
    moved: float
    exchanged: float
    seconds: float
    trained_parameters: int
    tokens: int

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes."""
        return self.peak * (1 + FRAGMENTATION) + RESERVED

    @property
    def fits(self) -> bool:
        """Whether the card has that much, for loading as well."""
        return max(self.needed, self.loading + RESERVED) <= self.card.memory


def transformer_config(backbone: Backbone, path: str | None) -> dict[str, Any]:
    """Of a local folder, else the full size; the tiny one where there is no path."""
    from multicrafter.models.flux import shipped

    folder = Path(path) if path is not None else shipped()
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    names = [*backbone.full_config, *(k for k in ("patch_size", "out_channels") if k in content)]
    return {k: tuple(content[k]) if isinstance(content[k], list) else content[k] for k in names if k in content}


def token_side(path: str | None, backbone: Backbone | None = None) -> int:
    """Pixels of a token's side, from a local VAE; 16 for the full-size models."""
    backbone = backbone or BACKBONES[0]
    from multicrafter.models.flux import shipped

    file = (Path(path) if path is not None else shipped()) / "vae" / "config.json"
    return backbone.latents_per_token * backbone.vae_factor(json.loads(file.read_text())) if file.is_file() else 16


def shape_of(run: Run) -> Shape:
    """Tokens of one sample: the largest pictures and references, and the largest number of people, that the run has."""
    side, world = token_side(run.model.path, get_backbone(run.model.backbone)), run.world
    stage = run.pretrain if isinstance(run, Stage1) else run.align
    picture, reference = (
        tuple(extent // side for extent in max(shapes or (own,), key=math.prod))
        for shapes, own in ((stage.shapes, world.height_width), (stage.reference_shapes, world.reference_height_width))
    )
    people = max(world.numbers)
    if stage.data is not None and Path(stage.data).exists():  # a run may be planned where its photos are not
        people = max(len(record["subjects"]) for record in training_records(stage.data))
    each = world.references_per_subject
    return Shape(run.model.text_tokens, picture, reference, people * each, each)  # type: ignore[arg-type]


def measure(
    run: Run,
    *,
    rows: int,
    device: str = "cuda",
    fake: bool = True,
    config: dict[str, Any] | None = None,
    shape: Shape | None = None,
    around: AbstractContextManager[Any] | None = None,
) -> Pass:
    """One pass of a run under a `MemoryTracker`.

    Args:
        run: Stage 1 or 2.
        rows: Samples.
        device: "cuda" plans the optimizer's fused lists, "cpu" its loop.
        fake: Tensors without memory; False runs it for real (slices only).
        config: Of the transformer, instead of the run's model's.
        shape: Of a sample, instead of the run's.
        around: Entered around the pass (to measure it in another way as well).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    backbone = get_backbone(run.model.backbone)
    config = transformer_config(backbone, run.model.path) if config is None else config
    shape = shape or shape_of(run)
    with FakeTensorMode() if fake else nullcontext(), Answers() if fake else nullcontext():
        trained_config = run.pretrain.adapters if isinstance(run, Stage1) else run.adapters
        transformer, attached = build(backbone, config, run.execution, trained_config)
        stage: PlannedPretrain | PlannedPolicy
        if isinstance(run, Stage1):
            stage = PlannedPretrain(attached, run.pretrain, shape, rows=rows)
        else:
            align = run.align
            stage = PlannedPolicy(
                attached, run.execution, shape, rows=rows, lr=align.lr, adamw=align.adamw, online=online_config(align)
            )
        for group in stage.optimizer.param_groups:
            group["foreach"] = device == "cuda"
        trained = {id(p) for p in stage.adapters.parameters()}
        frozen = [p for p in transformer.parameters() if id(p) not in trained] + list(transformer.buffers())
        own = list(stage.adapters.parameters())
        states = [t for s in stage.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        ema = list(stage.trainee.ema.values())
        tracker = MemoryTracker()
        tracker.track([*frozen, *own, *states, *ema])
        blocks = [block for _, block in transformer_blocks(transformer)]
        sizes = [bytes_of(p for p in b.parameters() if id(p) not in trained) for b in blocks]
        linears = [bytes_of([transformer.get_parameter(f"{n}.weight")]) for n in quantized_linears(transformer, own)]
        forward = _Forward(stage, tracker)
        with around or nullcontext(), tracker.phase():
            stage.once()
        flops, moved = float(tracker.flops), float(tracker.moved)
        if isinstance(stage, PlannedPolicy):
            flops = (flops - forward.unlearned * forward.flops) / stage.passes
            moved = (moved - forward.unlearned * forward.moved) / stage.passes
    return Pass(
        rows=rows, base=bytes_of(frozen), adapters=bytes_of(own) + bytes_of(ema), optimizer=bytes_of(states), gradients=bytes_of(own),
        peak=tracker.peak, block=max(sizes), linears=sum(linears), linear=max(linears), flops=flops, forward_flops=forward.flops, moved=moved,
        forward_moved=forward.moved,
    )  # fmt: skip


class _Forward:
    """Operations and traffic of one function evaluation of a pass, and how many of them there are without gradients."""

    def __init__(self, stage: PlannedPretrain | PlannedPolicy, tracker: MemoryTracker) -> None:
        """Looks at the tracker around every evaluation of the stage."""
        self.flops = self.moved = 0.0
        self.unlearned, self.tracker, self.predict = 0, tracker, stage.trainee.predict
        stage.trainee.predict = self  # type: ignore[method-assign,assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainee.predict`."""
        flops, moved = self.tracker.flops, self.tracker.moved
        velocity = self.predict(*args, **kwargs)
        self.flops, self.moved = float(self.tracker.flops - flops), float(self.tracker.moved - moved)
        self.unlearned += not torch.is_grad_enabled()
        return velocity


def rows_of(run: Run, gpus: int) -> tuple[int, int]:
    """Samples of a pass on one card, and all samples of a step; in stage 2 the larger of a rollout's and an update's parts."""
    if isinstance(run, Stage1):
        total, sizes = run.pretrain.batch, [run.execution.micro_batch]
    else:
        total = run.align.prompts * run.align.online.group_size
        sizes = [run.align.micro_batch, run.align.online.policy.micro_batch_size]
    mine = math.ceil(total / gpus)
    return min(max(size or mine for size in sizes), mine), total


def predict(run: Run, card: Card, *, gpus: int = 1, measured: Pass | None = None) -> Plan:
    """The plan of a run.

    Args:
        run: Stage 1 or 2.
        card: What it would run on.
        gpus: How many.
        measured: A pass of this run with the right rows, if it is known already: it does not depend on the card.

    Raises:
        ValueError: ``gpus`` is below 1, or there are more than samples.
    """
    rows, total = rows_of(run, gpus) if gpus >= 1 else (0, 0)
    if gpus < 1 or gpus > total:
        raise UserError(f"gpus must be between 1 and the {total or 'number of'} samples of a step, got {gpus}")
    one = measured if measured is not None and measured.rows == rows else measure(run, rows=rows)
    execution, backbone = run.execution, get_backbone(run.model.backbone)
    parts = _parts(run, one, gpus, backbone)
    if isinstance(run, Stage1):
        passes, evaluations = total / rows, 0.0
    else:
        counted = align_evaluations(run.align)
        passes, evaluations = counted.backward / rows, counted.forward / rows
    flops = passes * one.flops + evaluations * one.forward_flops
    moved = passes * one.moved + evaluations * one.forward_moved
    exchanged = 0.0
    if gpus > 1:
        share = (gpus - 1) / gpus
        exchanged = 2 * share * one.gradients
        if execution.parallel == "fsdp":
            exchanged += share * one.base * (2 * passes + evaluations) / gpus
    seconds = max(flops / (card.tflops * 1e12 * EFFICIENCY), moved * FUSION / (card.bandwidth * 1e9)) / gpus
    seconds += exchanged / (card.link * 1e9)
    item = 2 if execution.dtype == "bfloat16" else 4
    return Plan(
        gpus=gpus, card=card, parts=parts, loading=_loading(run, one, backbone), cached=_cached(run, backbone, item), flops=flops, moved=moved,
        exchanged=exchanged,
        seconds=seconds, trained_parameters=int(one.gradients / 4), tokens=shape_of(run).total,
    )  # fmt: skip


def _base(run: Run, one: Pass) -> float:
    """Bytes of the frozen base, as quantised as it is."""
    if run.execution.quantization == "none":
        return one.base
    per = NF4_BYTES if run.execution.quantization == "nf4" else INT8_BYTES
    return one.base + one.linears * (per / _item(run) - 1)


def _item(run: Run) -> int:
    return 2 if run.execution.dtype == "bfloat16" else 4


def _loading(run: Run, one: Pass, backbone: Backbone) -> float:
    """The larger of what encodes and of what comes after it: the base, one linear of it not yet quantised, and nothing sharded yet."""
    placing = _base(run, one) + (0.0 if run.execution.quantization == "none" else one.linear)
    if transformer_config(backbone, run.model.path):  # somebody's own, or the tiny one: its other parts are not known
        return placing
    vae = _item(run) * backbone.vae_parameters()
    return vae + max(placing, _item(run) * backbone.text_encoder_parameters())


def _parts(run: Run, one: Pass, gpus: int, backbone: Backbone) -> dict[str, float]:
    """Bytes on one card."""
    execution = run.execution
    item, base, optimizer = _item(run), _base(run, one), one.optimizer
    if execution.optimizer == "adamw8bit":
        optimizer = one.gradients / 4 * ADAM8_BYTES
    parts = {
        "base": base,
        "adapters": one.adapters,
        "optimizer": optimizer,
        "activations and gradients": one.activations,
    }
    if gpus > 1 and execution.parallel == "fsdp":
        parts["unsharded blocks"] = 2 * (one.block + one.adapters / max(1, round(one.base / max(one.block, 1))))
        parts["base"], parts["adapters"], parts["optimizer"] = base / gpus, one.adapters / gpus, optimizer / gpus
        parts["activations and gradients"] = one.activations - one.gradients * (1 - 1 / gpus)
    elif gpus > 1:
        parts["gradient buckets"] = one.gradients  # of DistributedDataParallel, beside the gradients
    full = not transformer_config(backbone, run.model.path)
    if full and execution.cache is None:
        parts["text encoders and VAE"] = item * (backbone.text_encoder_parameters() + backbone.vae_parameters())
    elif full and isinstance(run, Stage2):
        parts["VAE"] = item * backbone.vae_parameters()
    return {k: max(v, 0.0) for k, v in parts.items()}


def _cached(run: Run, backbone: Backbone, item: int) -> float:
    """Encoded pictures, references and texts of all scenes."""
    shape, config = shape_of(run), {**backbone.full_config, **transformer_config(backbone, run.model.path)}
    count = run.pretrain.num_scenes if isinstance(run, Stage1) else run.num_scenes
    picture = (shape.total - shape.text) * config["in_channels"]
    return float(4 * count * (picture + shape.text * config[backbone.text_width_name]))


def with_cache(run: Run) -> Run:
    """The run with its texts and pictures encoded on disk beforehand, as `multicrafter plan` assumes unless told otherwise."""
    execution = replace(run.execution, cache=run.execution.cache or "cache")
    if isinstance(run, Stage1):
        return replace(run, pretrain=replace(run.pretrain, execution=execution))
    return replace(run, align=replace(run.align, execution=execution))
