"""Too little memory is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import torch

from multicrafter import UserError
from multicrafter.config.recipes import Run, Stage1
from multicrafter.models.backbones import BACKBONES
from multicrafter.plan.estimate import predict
from multicrafter.plan.hardware import Card

SMALL = 1 << 30  # weights below this are not worth a plan


def available_memory(device: str | None = None) -> int:
    """Bytes that are free on a device; of the machine where it is None or "cpu"."""
    kind = torch.device(device or "cpu")
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0])
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def weight_bytes(folder: Path, part: str = "") -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(f.stat().st_size for f in (folder / part).rglob("*.safetensors"))


def require_memory(run: Run, *, device: str | None = None, gpus: int = 1) -> None:
    """Compares the plan of a run with the memory that is free.

    Raises:
        ValueError: It is not enough; the sentence says by how much and what would help.
    """
    path = run.model.path
    if path is None or (Path(path).exists() and weight_bytes(Path(path), "transformer") < SMALL):
        return
    free = available_memory(device)
    card = Card(name="this machine", memory=float(free), tflops=1.0, bandwidth=1.0, link=1.0)
    plan = predict(run, card, gpus=gpus)
    if plan.peak <= free:
        return
    prefix = "pretrain" if isinstance(run, Stage1) else "align"
    parts = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in plan.parts.items() if v >= 5e7)
    raise UserError(
        f"memory must hold about {plan.peak / 1e9:.1f} GB ({parts}), got {free / 1e9:.1f} GB free on {device or 'cpu'}; what helps: "
        f"--set {prefix}.execution.quantization=nf4, .optimizer=adamw8bit, .cache=FOLDER, a smaller rank, more processes"
    )


def require_weights(model: str | Path | None, dtype: torch.dtype, *, device: str | None = None) -> None:
    """For inference: compares the weights alone, which a plan cannot undercut, with the memory that is free.

    Raises:
        ValueError: It is not enough.
    """
    if model is None:
        return
    if Path(model).exists():
        needed = weight_bytes(Path(model))
        if needed < SMALL:
            return
    else:
        known = [b for b in BACKBONES if b.hub_id.lower() == str(model).lower()]
        if not known:
            return
        backbone = known[0]
        from multicrafter.models.backbones.base import count_parameters, on_meta

        count = count_parameters(on_meta(backbone.build_transformer))
        needed = dtype.itemsize * (count + backbone.text_encoder_parameters() + backbone.vae_parameters())
    free = available_memory(device)
    if needed > free:
        raise UserError(
            f"memory must hold the weights of {model}, {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, got "
            f"{free / 1e9:.1f} GB free on {device or 'cpu'}; what helps: --dtype bfloat16, a smaller model"
        )
