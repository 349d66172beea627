"""``multicrafter generate``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from multicrafter import UserError, user_input
from multicrafter.cli.options import add_command, binding, finder, positive, separation_options, writable

logger = logging.getLogger(__name__)


def number(given: str, text: str) -> float:
    """The weight after ``--lora FILE=``."""
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--lora must be FILE or FILE=WEIGHT, got {given!r}") from error


def generate(arguments: argparse.Namespace) -> int:
    """Pictures from references."""
    from id_reward.images import open_image
    from tqdm import tqdm

    from multicrafter.files import appearing
    from multicrafter.models.backbones import get_backbone
    from multicrafter.pipeline import MultiCrafterPipeline
    from multicrafter.world import shipped_adapter

    if not arguments.reference:
        raise UserError("--reference must be given at least once, got none")
    if not arguments.prompt.strip():
        raise UserError("--prompt must not be empty")
    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out must end in .png, .jpg or .webp, got {str(arguments.out)!r}")
    writable(arguments.out)
    if arguments.sheet is not None:
        if arguments.sheet.suffix.lower() != ".png" or arguments.sheet == arguments.out:
            raise UserError(f"--sheet must be another file than --out and end in .png, got {str(arguments.sheet)!r}")
        writable(arguments.sheet)
    with user_input():
        references = [open_image(path) for path in arguments.reference]
        masks = [open_image(path) for path in arguments.mask] or None
    if arguments.model is not None:
        from multicrafter.models.loading import get_dtype
        from multicrafter.plan import require_weights

        require_weights(arguments.model, get_dtype(arguments.dtype), device=arguments.device)
    adapter = arguments.adapter
    if adapter is None and arguments.model is None:
        adapter = shipped_adapter()
    elif str(adapter) == "none":
        adapter = None
    pipeline = MultiCrafterPipeline.from_pretrained(
        arguments.model, adapter=adapter, dtype=arguments.dtype, device=arguments.device,
        backbone=get_backbone(arguments.backbone) if arguments.backbone else None,
        finder=finder(arguments.finder, arguments.model),
    )  # fmt: skip
    kept_apart = binding(arguments, pipeline.notes)
    if masks is not None and kept_apart.mode != "masks":
        raise UserError(f"--mask is for --separation masks, got --separation {kept_apart.mode}")
    steps = arguments.steps or pipeline.num_steps
    for given in arguments.lora:
        path, _, weight = given.rpartition("=")
        pipeline.load_lora(path or weight, weight=number(given, weight) if path else 1.0)
    if len(references) > pipeline.max_references:
        what = "the adapter was" if adapter else "a base without adapter is"
        logger.warning(
            f"{len(references)} references, but {what} trained for {pipeline.max_references}; expect blending"
        )
    with tqdm(total=steps, desc="generate", disable=not sys.stderr.isatty()) as bar:
        pictures = pipeline(
            arguments.prompt, references, num_images=arguments.num_images, num_steps=steps, seed=arguments.seed,
            guidance=arguments.guidance, negative_prompt=arguments.negative_prompt, true_guidance=arguments.true_guidance,
            size=arguments.size, reference_size=arguments.reference_size, progress=lambda _: bar.update(),
            separation=kept_apart, masks=masks,
        )  # fmt: skip
        if arguments.sheet is not None:
            _sheet(pipeline, arguments, references, pictures, kept_apart, steps)
    for index, picture in enumerate(pictures):
        path = arguments.out if len(pictures) == 1 else arguments.out.with_stem(f"{arguments.out.stem}_{index}")
        with appearing(path) as temporary:
            picture.save(temporary)
        print(path)
    return 0


def _sheet(
    pipeline: Any,
    arguments: argparse.Namespace,
    references: list[Any],
    pictures: list[Any],
    kept_apart: Any,
    steps: int,
) -> None:
    """References, and the first picture without and with separated attention, from the same noise, on one sheet."""
    from multicrafter.demo.figures import sheet

    free = pictures
    if kept_apart.mode != "none":
        free = pipeline(
            arguments.prompt, references, num_images=1, num_steps=steps, seed=arguments.seed, guidance=arguments.guidance,
            negative_prompt=arguments.negative_prompt, true_guidance=arguments.true_guidance, size=arguments.size,
            reference_size=arguments.reference_size, separation="none",
        )  # fmt: skip
    labelled = {"attention as it is": free[0]}
    if kept_apart.mode != "none":
        labelled["attention separated"] = pictures[0]
    arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
    print(sheet(arguments.sheet, references, labelled, title=arguments.prompt))


def add_parser(commands: Any) -> None:
    """Adds ``generate`` to the command line."""
    sub = add_command(commands, "generate", generate)
    sub.add_argument(
        "--reference",
        type=Path,
        action="append",
        default=[],
        metavar="PICTURE",
        help="once per subject; PNG, JPEG or WebP",
    )
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument(
        "--adapter", type=Path,
        help="folder written by pretrain, align or demo; none is the base alone; default: the one that ships, with the tiny model",
    )  # fmt: skip
    sub.add_argument(
        "--sheet", type=Path, metavar="PNG",
        help="also draw the picture without separation, and put references and both pictures side by side",
    )  # fmt: skip
    sub.add_argument("--num-images", type=positive, default=1)
    sub.add_argument("--steps", type=positive, help="default: what the adapter says, else 20")
    sub.add_argument(
        "--guidance", type=float, help="embedded guidance; default: what the adapter says, else the backbone's"
    )
    separation_options(sub)
    sub.add_argument(
        "--mask", type=Path, action="append", default=[], metavar="PICTURE",
        help="once per reference: white where its subject is to be; for --separation masks",
    )  # fmt: skip
    sub.add_argument("--negative-prompt", default="", help="used with --true-guidance")
    sub.add_argument("--true-guidance", type=float, help="scale of a second, negative pass; default: the backbone's")
    sub.add_argument("--size", type=positive, help="side of the picture in pixels")
    sub.add_argument("--reference-size", type=positive, help="side of the references in pixels")
    sub.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="a plain LoRA to mix in; may be repeated"
    )
    sub.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--backbone", metavar="NAME", help="module:class of a backbone of your own")
