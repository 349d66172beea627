"""Too little memory is said before anything starts."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from multicrafter import UserError
from multicrafter.config.recipes import Run, Stage1
from multicrafter.models.backbones import BACKBONES
from multicrafter.models.needs import config_file, drawing_bytes, free_memory, require_drawing
from multicrafter.plan.estimate import predict, rows_of
from multicrafter.plan.hardware import Card

SMALL = 1 << 30  # weights below this are not worth a plan


def available_memory(device: str | None = None) -> int:
    """Bytes that are free on a device; of the machine where it is None or "cpu"."""
    return free_memory(device)


def weight_bytes(folder: Path, part: str = "") -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(f.stat().st_size for f in (folder / part).rglob("*.safetensors"))


def is_small(run: Run) -> bool:
    """Whether a run on a small base asks for nothing large, so that it needs no plan (which takes seconds)."""
    path, world, adapters = run.model.path, run.world, run.adapters
    if path is not None and not (Path(path).exists() and weight_bytes(Path(path), "transformer") < SMALL):
        return False
    rows, _ = rows_of(run, 1)
    scenes = run.pretrain.num_scenes if isinstance(run, Stage1) else run.num_scenes
    shapes = run.pretrain.shapes if isinstance(run, Stage1) else run.align.shapes
    pixels = max(math.prod(world.reference_height_width), *map(math.prod, shapes or (world.height_width,)))
    return (
        adapters.rank * max(1, adapters.num_experts) <= 1024 and pixels * rows <= 1 << 22 and pixels * scenes <= 1 << 30
    )


def require_memory(run: Run, *, device: str | None = None, gpus: int = 1) -> None:
    """Compares the plan of a run with the memory that is free.

    Raises:
        ValueError: It is not enough; the sentence says by how much and what would help.
    """
    if is_small(run):
        return
    free = available_memory(device)
    card = Card(name="this machine", memory=float(free), tflops=1.0, bandwidth=1.0, link=1.0)
    plan = predict(run, card, gpus=gpus)
    host = free_memory() if run.execution.cache is None else math.inf
    if plan.cached > host:
        raise UserError(
            f"memory must hold about {plan.cached / 1e9:.1f} GB of encoded scenes, got {host / 1e9:.1f} GB free; what helps: fewer "
            "scenes, a smaller size; --force tries it all the same"
        )
    if max(plan.peak, plan.loading) <= free:
        return
    prefix = "pretrain" if isinstance(run, Stage1) else "align"
    parts = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in plan.parts.items() if v >= 5e7)
    if plan.peak <= free:
        raise UserError(
            f"memory must hold about {plan.loading / 1e9:.1f} GB while texts are encoded and weights are brought, got "
            f"{free / 1e9:.1f} GB free on {device or 'cpu'}; what helps: texts "
            f"that another machine has encoded into {prefix}.execution.cache, and --force"
        )
    raise UserError(
        f"memory must hold about {plan.peak / 1e9:.1f} GB ({parts}), got {free / 1e9:.1f} GB free on {device or 'cpu'}; what helps: "
        f"--set {prefix}.execution.quantization=nf4, .optimizer=adamw8bit, .cache=FOLDER, a smaller rank, more processes; --force "
        "tries it all the same"
    )


def require_picture(
    model: str | Path | None,
    dtype: torch.dtype,
    *,
    size: int | tuple[int, int] | None,
    reference_size: int | None,
    references: int,
    pictures: int,
    device: str | None = None,
) -> None:
    """For inference, before anything is loaded: compares what drawing needs with the memory that is free.

    Raises:
        ValueError: It is not enough.
    """
    from multicrafter.models.flux import shipped

    if size is None and pictures == 1:
        return
    folder = Path(model) if model is not None else shipped()
    transformer, vae = config_file(folder, "transformer"), config_file(folder, "vae")
    token_side = None
    if not {"num_attention_heads", "attention_head_dim"} <= transformer.keys():
        known = [b for b in BACKBONES if b.hub_id.lower() == str(model).lower()]
        if not known:
            return
        transformer, token_side = dict(known[0].full_config), 16
    elif "temperal_downsample" in vae:  # a VAE of Qwen-Image, whose other names would be read as one level
        own = [b for b in BACKBONES if b.transformer_class == transformer.get("_class_name")]
        token_side = (own[0].latents_per_token if own else 2) * 2 ** len(vae["temperal_downsample"])
    side = size or int(vae.get("sample_size") or 512)
    height, width = (side, side) if isinstance(side, int) else side
    small = reference_size or min(height // 2, width // 2, 512)
    need = drawing_bytes(
        transformer, vae, size=(height, width), reference_size=small, references=references,
        pictures=pictures, text_tokens=1, itemsize=dtype.itemsize, token_side=token_side,
    )  # fmt: skip
    require_drawing(need, device=device, what=f"{pictures} pictures of {height} x {width} pixels at once")


def require_weights(model: str | Path | None, dtype: torch.dtype, *, device: str | None = None) -> None:
    """For inference: compares the weights alone, which a plan cannot undercut, with the memory that is free.

    The machine's memory holds all of them; a card the larger of transformer and text encoders at a time, and the rest.

    Raises:
        ValueError: It is not enough.
    """
    if model is None:
        return
    folder = Path(model)
    if folder.exists():
        rest = weight_bytes(folder)
        if rest < SMALL:
            return
        transformer = weight_bytes(folder, "transformer")
        encoders = sum(weight_bytes(folder, part.name) for part in folder.glob("text_encoder*"))
        rest -= transformer + encoders
    else:
        known = [b for b in BACKBONES if b.hub_id.lower() == str(model).lower()]
        if not known:
            return
        backbone = known[0]
        from multicrafter.models.backbones.base import count_parameters, on_meta

        transformer = dtype.itemsize * count_parameters(on_meta(backbone.build_transformer))
        encoders, rest = dtype.itemsize * backbone.text_encoder_parameters(), dtype.itemsize * backbone.vae_parameters()
    on_card = torch.device(device or "cpu").type != "cpu"
    needed = rest + (max(transformer, encoders) if on_card else transformer + encoders)
    free = available_memory(device)
    if needed > free:
        raise UserError(
            f"memory must hold the weights of {model}, {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, got "
            f"{free / 1e9:.1f} GB free on {device or 'cpu'}; what helps: --dtype bfloat16, a smaller model"
        )
