"""``multicrafter generate``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from multicrafter import UserError, user_input
from multicrafter.cli.options import (
    add_command,
    binding,
    force_option,
    loaded_pipeline,
    picture_size,
    positive,
    real,
    separation_options,
    writable,
)
from multicrafter.models.checks import finite

logger = logging.getLogger(__name__)


def lora(given: str) -> tuple[str, float]:
    """File and weight of ``--lora FILE`` or ``--lora FILE=WEIGHT``; a file's name may hold a "=" itself."""
    path, _, weight = given.rpartition("=")
    if not path or Path(given).exists():
        return given, 1.0
    try:
        return path, finite("weight", float(weight))
    except ValueError as error:
        raise UserError(f"--lora must be FILE or FILE=WEIGHT, with a finite number as weight, got {given!r}") from error


def names(out: Path, count: int) -> list[Path]:
    """Files of ``count`` pictures: ``out``, or ``out`` with _0, _1, ...

    >>> [p.name for p in names(Path("a.png"), 2)]
    ['a_0.png', 'a_1.png']
    """
    return [out] if count == 1 else [out.with_stem(f"{out.stem}_{index}") for index in range(count)]


def generate(arguments: argparse.Namespace) -> int:
    """Pictures from references."""
    from id_reward.images import open_image
    from tqdm import tqdm

    from multicrafter.files import appearing
    from multicrafter.models.loading import get_device, get_dtype
    from multicrafter.models.pictures import coverage, shared

    if not arguments.reference:
        raise UserError("--reference must be given at least once, got none")
    if not arguments.prompt.strip():
        raise UserError("--prompt must not be empty")
    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out must end in .png, .jpg or .webp, got {str(arguments.out)!r}")
    writable(arguments.out, file=True, most=arguments.num_images)
    if arguments.sheet is not None:
        if arguments.sheet.suffix.lower() != ".png" or arguments.sheet == arguments.out:
            raise UserError(f"--sheet must be another file than --out and end in .png, got {str(arguments.sheet)!r}")
        writable(arguments.sheet, file=True)
    loras = [lora(given) for given in arguments.lora]
    with user_input():
        references = [open_image(path) for path in arguments.reference]
    for path in arguments.mask:
        coverage(path)  # before a model is loaded
    masks = list(arguments.mask) or None
    counts = arguments.references_per_subject
    if counts is not None and sum(counts) != len(references):
        raise UserError(
            f"--references-per-subject must add up to the {len(references)} given --reference, got {counts}"
        )
    if (twins := shared(references, counts)) is not None:
        logger.warning(
            f"subjects {twins[0] + 1} and {twins[1] + 1} have the same picture: nothing tells them apart, in the draft or to a match"
        )
    if arguments.device is not None:
        get_device(arguments.device)
    if not arguments.force:
        from multicrafter.plan import require_picture, require_weights

        dtype = get_dtype(arguments.dtype)
        require_picture(
            arguments.model, dtype, size=arguments.size, reference_size=arguments.reference_size, references=len(references),
            pictures=arguments.num_images, device=arguments.device,
        )  # fmt: skip
        require_weights(arguments.model, dtype, device=arguments.device)
    targets = names(arguments.out, arguments.num_images)
    given = {p.resolve() for p in (*arguments.reference, *arguments.mask)}
    if overwritten := [t for t in targets if t.resolve() in given]:
        raise UserError(f"--out must not be one of the given pictures, got {overwritten[0]}")
    if arguments.sheet is not None and arguments.sheet.resolve() in {*given, *(t.resolve() for t in targets)}:
        raise UserError(f"--sheet must be neither one of the given pictures nor one of --out, got {arguments.sheet}")
    pipeline = loaded_pipeline(arguments)
    kept_apart = binding(arguments, pipeline.notes)
    if masks is not None and kept_apart.mode != "masks":
        raise UserError(f"--mask is for --separation masks, got --separation {kept_apart.mode}")
    steps = arguments.steps or pipeline.num_steps
    sizes = {
        "size": arguments.size, "reference_size": arguments.reference_size, "reference_shape": arguments.reference_shape,
        "references_per_subject": arguments.references_per_subject,
    }  # fmt: skip
    for source, weight in loras:
        pipeline.load_lora(source, weight=weight)
    subjects = len(arguments.references_per_subject or references)
    if subjects > pipeline.max_references:
        what = "the adapter was" if pipeline.adapters is not None else "a base without adapter is"
        logger.warning(
            f"{subjects} {'references' if arguments.references_per_subject is None else 'subjects'}, but {what} trained for "
            f"{pipeline.max_references}; expect blending"
        )
    with tqdm(total=steps, desc="generate", disable=not sys.stderr.isatty()) as bar:
        pictures = pipeline(
            arguments.prompt, references, num_images=arguments.num_images, num_steps=steps, seed=arguments.seed,
            guidance=arguments.guidance, negative_prompt=arguments.negative_prompt, true_guidance=arguments.true_guidance,
            progress=lambda _: bar.update(), separation=kept_apart, masks=masks, force=arguments.force, **sizes,
        )  # fmt: skip
        if arguments.sheet is not None:
            _sheet(pipeline, arguments, references, pictures, kept_apart, steps, sizes)
    for target, picture in zip(targets, pictures, strict=True):
        with appearing(target) as temporary:
            picture.save(temporary)
        print(target)
    return 0


def _sheet(
    pipeline: Any,
    arguments: argparse.Namespace,
    references: list[Any],
    pictures: list[Any],
    kept_apart: Any,
    steps: int,
    sizes: dict[str, Any],
) -> None:
    """References, and the first picture without and with separated attention, from the same noise, on one sheet."""
    from multicrafter.demo.figures import sheet

    free = pictures
    if kept_apart.mode != "none":
        free = pipeline(
            arguments.prompt, references, num_images=1, num_steps=steps, seed=arguments.seed, guidance=arguments.guidance,
            negative_prompt=arguments.negative_prompt, true_guidance=arguments.true_guidance, separation="none", **sizes,
        )  # fmt: skip
    as_it_is = "attention as it is"
    labelled = {as_it_is: free[0]}
    if kept_apart.mode != "none":
        labelled = {f"without the method\n{as_it_is}": free[0], "with the method\nattention separated": pictures[0]}
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
        help="once per subject, or more often with --references-per-subject; PNG, JPEG or WebP",
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
        "--guidance", type=real, help="embedded guidance; default: what the adapter says, else the backbone's"
    )
    separation_options(sub)
    sub.add_argument(
        "--mask", type=Path, action="append", default=[], metavar="PICTURE",
        help="once per subject: white where it is to be; for --separation masks",
    )  # fmt: skip
    sub.add_argument("--negative-prompt", default="", help="used with --true-guidance")
    sub.add_argument("--true-guidance", type=real, help="scale of a second, negative pass; default: the backbone's")
    sub.add_argument(
        "--size",
        type=picture_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="of the picture in pixels, such as 512 or 512x768",
    )
    sub.add_argument("--reference-size", type=positive, help="side of the references in pixels")
    sub.add_argument(
        "--reference-shape", choices=("square", "own"), default="square",
        help="square: references are padded to squares; own: each keeps the shape of its picture, at about as many pixels",
    )  # fmt: skip
    sub.add_argument(
        "--references-per-subject", type=positive, nargs="+", metavar="N",
        help="how many neighbouring --reference show each subject, such as 2 1; default: one each",
    )  # fmt: skip
    sub.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="a plain LoRA to mix in; may be repeated"
    )
    force_option(sub)
    sub.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--backbone", metavar="NAME", help="module:class of a backbone of your own")
